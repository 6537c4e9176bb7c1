"""Chat messages in the shapes that templates accept. Pure; knows nothing of Jinja.

A message is a JSON object: "role", "content" (text, a list of parts, or None) and whatever else its role allows.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from llmd.errors import InvalidRequest

Message = dict[str, Any]

_SYSTEM_ROLES = ("system", "developer")


def normalized(messages: Sequence[Mapping[str, Any]], *, keeps_parts: bool, knows_developer: bool) -> list[Message]:
    """The messages as a template expects them; the originals stay as they are.

    Lists of text parts stay lists if the template goes through them (`keeps_parts`), else become one text with a
    line for each part. No content is the empty text. "developer" is the newer name of "system". Raises InvalidRequest
    for parts that are not text.
    """
    result = []
    for index, message in enumerate(messages):
        role = message.get("role")
        content = message.get("content")
        if isinstance(content, list):
            parts = [_text_part(part, param=f"messages.{index}.content.{i}") for i, part in enumerate(content)]
            content = parts if keeps_parts else "\n".join(part["text"] for part in parts)
        if role == "developer" and not knows_developer:
            role = "system"
        result.append({**message, "role": role, "content": "" if content is None else content})
    return result


def milder_variants(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The same talk in forms that more and more templates accept, the least changed first.

    1. Neighbours of the same role are one message. 2. System messages after the first message are user messages.
    3. So are all of them.
    """
    previous = list(messages)
    for variant in (
        _merge_neighbours(messages),
        _merge_neighbours([*messages[:1], *map(_as_user, messages[1:])]),
        _merge_neighbours(list(map(_as_user, messages))),
    ):
        if variant != previous:
            yield variant
        previous = variant


def with_suffix(messages: Sequence[Message], suffix: str) -> list[Message]:
    """The messages, with `suffix` behind the last one's text. Raises InvalidRequest if it has none."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, list) and content:
        last = {**content[-1], "text": content[-1]["text"] + suffix}
        return [*messages[:-1], {**messages[-1], "content": [*content[:-1], last]}]
    if isinstance(content, str) and content:
        return [*messages[:-1], {**messages[-1], "content": content + suffix}]
    raise InvalidRequest("continue_final_message needs a final message with text to continue.", param="messages")


def _text_part(part: Any, *, param: str) -> Message:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get(kind) if kind in ("text", "refusal") else None
    if not isinstance(text, str):
        raise InvalidRequest(f"This model takes text only; a content part of type {kind!r} is not.", param=param)
    return {"type": "text", "text": text}


def _as_user(message: Message) -> Message:
    return {**message, "role": "user"} if message["role"] in _SYSTEM_ROLES else message


def _merge_neighbours(messages: Sequence[Message]) -> list[Message]:
    """Neighbours of the same role become one, where they hold nothing but content (tool calls stay apart)."""
    merged: list[Message] = []
    for (_, role), group in groupby(enumerate(messages), key=_neighbourhood):
        alike = [message for _, message in group]
        # joined once: pair by pair, ten thousand of them would take minutes
        merged.append(alike[0] if len(alike) == 1 else {"role": role, "content": _joined(alike)})
    return merged


def _neighbourhood(numbered: tuple[int, Message]) -> tuple[int, Any]:
    """The same for messages that may be merged: (−1, role), and for any other message its own index."""
    index, message = numbered
    return (-1 if _is_plain(message) else index), message["role"]


def _is_plain(message: Message) -> bool:
    return message["role"] in ("user", "assistant", *_SYSTEM_ROLES) and message.keys() == {"role", "content"}


def _joined(messages: Sequence[Message]) -> str | list[Message]:
    """Their contents as one: texts with an empty line between them, lists of parts one behind the other."""
    contents = [message["content"] for message in messages]
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(filter(None, contents))
    return [part for content in contents for part in _as_parts(content)]


def _as_parts(content: str | list[Message]) -> list[Message]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
