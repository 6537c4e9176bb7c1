"""One request as its client sees it: the answer, whole or streamed, in a form in which answers can be compared.

Strict where clients are lenient: a stream that is not exactly as documented is no answer.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httpx

from soaking.questions import Body

OnEvent = Callable[[Body], None]


class Refused(Exception):
    """The server said no, with an OpenAI error object. Nothing was computed."""

    def __init__(self, status: int, error: dict[str, Any], retry_after: float | None) -> None:
        super().__init__(f"{status}: {error['message']}")
        self.status = status
        self.error = error
        self.retry_after = retry_after  # seconds


class Broken(Exception):
    """What came is no answer: it was cut, it ended with an error, or it is not what the documents promise."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client may rely on: the same for the same question, in whatever manner it was asked."""

    choices: dict[int, dict[str, Any]]  # index → text, token_ids, logprobs, finish_reason, stop_reason
    usage: dict[str, int]


@dataclass(slots=True)
class Connection:
    """What is known of one request while it is under way. Times on `perf_counter`."""

    local_port: int = 0  # 0 while there is no connection
    began: bool = False  # the answer's status line has come
    last_event_at: float = field(default_factory=perf_counter)
    longest_pause: float = 0.0  # seconds between the events of a stream

    async def trace(self, name: str, info: dict[str, Any]) -> None:
        """What httpx calls at every step."""
        if name == "connection.connect_tcp.complete":
            self.local_port = info["return_value"].get_extra_info("client_addr")[1]

    def note_event(self) -> None:
        now = perf_counter()
        self.longest_pause = max(self.longest_pause, now - self.last_event_at)
        self.last_event_at = now


async def ask(
    client: httpx.AsyncClient,
    path: str,
    body: Body,
    *,
    connection: Connection | None = None,
    on_event: OnEvent = lambda _: None,
) -> Answer:
    """The answer to one request; `on_event` is called with each event of a stream.

    Raises Refused, Broken, or httpx.TransportError if the connection ends before the answer does.
    """
    connection = connection or Connection()
    async with client.stream("POST", path, json=body, extensions={"trace": connection.trace}) as response:
        connection.began = True
        if response.status_code != 200:
            raise _refusal(response, await response.aread())
        if not body.get("stream"):
            whole = json.loads(await response.aread())
            return Answer(_joined(whole["choices"]), _without_cache(whole["usage"]))
        # the wait for the first token is one too
        connection.last_event_at = perf_counter()
        return await _read_stream(response, connection, on_event)


async def _read_stream(response: httpx.Response, connection: Connection, on_event: OnEvent) -> Answer:
    parts: list[Body] = []
    usage: dict[str, Any] | None = None
    is_done = False
    async for line in response.aiter_lines():
        if not line or line.startswith(":"):
            continue  # a comment keeps the connection alive and says nothing
        if is_done:
            raise Broken(f"something follows the end of the stream: {line}")
        if line == "data: [DONE]":
            is_done = True
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise _error_event(chunk["error"])
        connection.note_event()
        parts += chunk["choices"]
        usage = _grown(usage, chunk["usage"])
        on_event(chunk)
    if not is_done or usage is None:
        raise Broken("the stream ended without its [DONE] and its usage")
    return Answer(_joined(parts), _without_cache(usage))


def _refusal(response: httpx.Response, content: bytes) -> Exception:
    try:
        error = json.loads(content)["error"]
        if set(error) != {"message", "type", "param", "code"}:
            raise KeyError(str(error))
    except (ValueError, KeyError, TypeError):
        return Broken(f"{response.status_code} without an error object: {content[:500]!r}")
    retry_after = response.headers.get("retry-after")
    return Refused(response.status_code, error, None if retry_after is None else float(retry_after))


def _error_event(error: dict[str, Any]) -> Exception:
    # a deadline is the client's own wish; a stream had begun with 200 by then
    if error.get("code") == "deadline_exceeded":
        return Refused(408, error, None)
    return Broken(f"an error in the stream: {error}")


def _grown(usage: dict[str, Any] | None, latest: dict[str, Any] | None) -> dict[str, Any] | None:
    """The latest usage, which is never less than the one before: nothing is counted twice or taken back."""
    if latest is None:
        return usage
    if usage is not None and latest["completion_tokens"] < usage["completion_tokens"]:
        raise Broken(f"usage went back from {usage} to {latest}")
    return latest


def _joined(parts: list[Body]) -> dict[int, dict[str, Any]]:
    """Choice index → everything that its parts say, joined. Raises Broken unless each choice ends exactly once."""
    choices: dict[int, dict[str, Any]] = {}
    for part in parts:
        choice = choices.setdefault(part["index"], {"text": "", "token_ids": [], "logprobs": []})
        if "finish_reason" in choice:
            raise Broken(f"choice {part['index']} goes on after its end: {part}")
        message = part.get("message") or part.get("delta") or {}
        choice["text"] += part.get("text") or message.get("content") or ""
        choice["token_ids"] += part.get("token_ids") or []
        choice["logprobs"] += _logprobs(part.get("logprobs"))
        if part["finish_reason"] is not None:
            choice |= {"finish_reason": part["finish_reason"], "stop_reason": part["stop_reason"]}
    for index, choice in choices.items():
        if "finish_reason" not in choice:
            raise Broken(f"choice {index} has no end")
    return dict(sorted(choices.items()))


def _logprobs(entry: dict[str, Any] | None) -> list[Any]:
    """One list an entry, whichever of the two endpoints it comes from."""
    if entry is None:
        return []
    if "content" in entry:
        return list(entry["content"])
    columns = (entry["tokens"], entry["token_logprobs"], entry["top_logprobs"], entry["text_offset"])
    return [list(row) for row in zip(*columns, strict=True)]


def _without_cache(usage: dict[str, Any]) -> dict[str, int]:
    """How much of a prompt the cache held is the one thing that a restart may change."""
    return {name: value for name, value in usage.items() if name != "prompt_tokens_details"}
