"""Chat messages in the shapes that templates accept. Pure; knows nothing of Jinja.

A message is a JSON object: "role", "content" (text, a list of parts, or None) and whatever else its role allows.
"""

from collections.abc import Iterator, Mapping, Sequence
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
    for message in messages:
        previous = merged[-1] if merged else None
        if previous is not None and previous["role"] == message["role"] and _is_plain(previous) and _is_plain(message):
            merged[-1] = {**previous, "content": _join(previous["content"], message["content"])}
        else:
            merged.append(message)
    return merged


def _is_plain(message: Message) -> bool:
    return message["role"] in ("user", "assistant", *_SYSTEM_ROLES) and message.keys() == {"role", "content"}


def _join(first: str | list[Message], second: str | list[Message]) -> str | list[Message]:
    """Two contents as one: texts with an empty line between them, lists of parts one behind the other."""
    if isinstance(first, str) and isinstance(second, str):
        return "\n\n".join(filter(None, (first, second)))
    return [*_as_parts(first), *_as_parts(second)]


def _as_parts(content: str | list[Message]) -> list[Message]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
