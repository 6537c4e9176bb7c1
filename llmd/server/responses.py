"""The two kinds of answer: a JSON value, and a stream that a coroutine writes. Knows nothing of what is in them."""

from collections.abc import Awaitable, Callable

import msgspec
from quart_trio.wrappers import TrioResponse

Send = Callable[[bytes], Awaitable[None]]

DONE = b"data: [DONE]\n\n"  # what a stream ends with, also one that failed

_encoder = msgspec.json.Encoder()


def json_response(value: object, *, status: int = 200, headers: dict[str, str] | None = None) -> TrioResponse:
    """Any msgspec-encodable value as a JSON answer."""
    return TrioResponse(_encoder.encode(value), status, headers, content_type="application/json")


class StreamResponse(TrioResponse):
    """Server-sent events, written by `await run(send)` while the client listens.

    `run` begins after the route has returned, so there is no request context any more: take what it needs from the
    request before. Each `send` hands its bytes on at once, and waits only for a client that reads slowly. If the
    client leaves, `run` is cancelled where it awaits; clean-up may not await. An exception out of `run` becomes an
    event `data: {"error": …}`, and `DONE` after it.
    """

    def __init__(self, run: Callable[[Send], Awaitable[None]]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(b"", 200, headers, content_type="text/event-stream; charset=utf-8")
        del self.headers["content-length"]
        self.run = run
        # Quart would cut the stream after RESPONSE_TIMEOUT, silently
        self.timeout = None
