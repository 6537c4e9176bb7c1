"""Server-sent events of one answer. It must not know how a chat or a completion looks: those bring a `Chunks`."""

import math
from typing import Protocol

import msgspec
import trio

from llmd.errors import DeadlineExceeded, EngineFailed
from llmd.server.answer import Answer
from llmd.server.choice import Delta
from llmd.server.error_handlers import error_body
from llmd.server.openai_responses import Usage
from llmd.server.question import Question
from llmd.server.responses import DONE, Send

# a comment: clients skip it, proxies see that the connection lives (WHATWG HTML, section 9.2.6)
KEEP_ALIVE = b": keep-alive\n\n"

encode_json = msgspec.json.Encoder().encode


class Chunks(Protocol):
    """How one endpoint writes its deltas."""

    def chunk(self, delta: Delta, usage: Usage | None) -> bytes:
        """One delta as one or more events. `usage`: tokens so far, for a client that wants them in every chunk."""
        ...

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event without choices that ends a stream whose client asks for usage."""
        ...


async def stream(answer: Answer, question: Question, chunks: Chunks, send: Send, *, keep_alive: float) -> None:
    """Generate, and send every delta as it comes; what is pending goes out in one write.

    While there is nothing to send, a comment goes out every `keep_alive` seconds; 0: none does.

    A client that leaves cancels this, and with it all its sequences. An engine's failure becomes an error event, and
    so does a deadline that passes before the first token.
    """
    options = question.request.stream_options
    include_usage = options is not None and bool(options.include_usage)
    usage_everywhere = include_usage and options is not None and bool(options.continuous_usage_stats)
    try:
        with answer:
            silent_until = trio.current_time() + (keep_alive or math.inf)
            while not answer.is_over:
                deltas = await answer.deltas(until=silent_until)
                usage = answer.usage() if usage_everywhere else None
                now = trio.current_time()
                if deltas:
                    await send(b"".join([chunks.chunk(delta, usage) for delta in deltas]))
                elif now >= silent_until:
                    await send(KEEP_ALIVE)
                else:
                    continue
                silent_until = now + (keep_alive or math.inf)
            ending = chunks.usage_chunk(answer.usage()) if include_usage else b""
        await send(ending + DONE)
    except (EngineFailed, DeadlineExceeded) as error:
        await send(b"data: " + error_body(error) + b"\n\n" + DONE)


class EventFrame:
    """The bytes that are the same in all events of a stream, rendered once: what changes stands between two of them."""

    def __init__(self, question: Question, object_name: str) -> None:
        names = {
            "id": question.id,
            "object": object_name,
            "created": question.created,
            "model": question.model,
            "system_fingerprint": question.system_fingerprint,
        }
        options = question.request.stream_options
        # an object, open at its end
        self._opening = b"data: " + encode_json(names)[:-1] + b',"choices":['
        self._closing = b'],"usage":null}\n\n' if options is not None and options.include_usage else b"]}\n\n"

    def event(self, choice: bytes, usage: Usage | None) -> bytes:
        """One event around a rendered choice, or around none."""
        closing = self._closing if usage is None else b'],"usage":' + encode_json(usage) + b"}\n\n"
        return self._opening + choice + closing
