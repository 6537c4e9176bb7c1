"""What is known of one HTTP request, from its arrival to the last byte of its answer, whatever becomes of it.

It stands around the whole application, so that every request has its record and its name (X-Request-Id), also one
that no route sees. It must not know what is done with a record.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio
from quart_trio import QuartTrio

from llmd.log import current_request_id
from llmd.server.api_keys import identity
from llmd.server.openai_responses import Usage
from llmd.server.question import Question
from llmd.server.request_headers import request_name

Message = Any  # an ASGI event: a dictionary with a "type"
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

# nginx's number for a client that closed the connection before its answer was complete; never sent
CLIENT_LEFT = 499

_log = logging.getLogger(__name__)


class Generated(Protocol):
    """What an `Answer` says of itself once it is over."""

    @property
    def finish_reasons(self) -> list[str]: ...
    @property
    def started_at(self) -> float | None: ...
    @property
    def first_token_seconds(self) -> float | None: ...
    def usage(self) -> Usage: ...


@dataclass(slots=True, eq=False, kw_only=True)
class RequestRecord:
    """One request. Times are in seconds on trio's clock, but for `unix_time`."""

    request_id: str
    method: str
    path: str  # without the query
    headers: dict[str, str] = field(repr=False)  # by small names; for programs, never for the log
    client: str  # address, "" if it came over a unix socket
    arrived: float
    unix_time: float  # of the arrival
    status: int = 500  # of the answer; what happens if the application gives none
    num_bytes: int = 0  # of the answer's body
    first_byte_at: float | None = None  # of the answer's body
    ended_at: float = 0.0
    is_complete: bool = False  # the last byte was handed over
    client_left: bool = False  # before that
    submitted_at: float | None = None  # to the engine
    question: Question | None = field(default=None, repr=False)
    answer: Generated | None = field(default=None, repr=False)

    @property
    def queue_seconds(self) -> float | None:
        """From the submission until an engine began with it; None if that did not come about."""
        started_at = None if self.answer is None else self.answer.started_at
        return None if started_at is None or self.submitted_at is None else started_at - self.submitted_at

    @property
    def identity(self) -> str:
        """Who asks, as the engine knows it too; "" without an API key."""
        return identity(self.headers.get("authorization"))


Listener = Callable[[RequestRecord], None]

_current: ContextVar[RequestRecord | None] = ContextVar("current_request_record", default=None)


def note_answer(question: Question, answer: Generated) -> None:
    """The request that runs here is answered by the engine."""
    if (record := _current.get()) is not None:
        record.question, record.answer = question, answer
        record.submitted_at = trio.current_time()


def record_requests(app: QuartTrio, listeners: Sequence[Listener]) -> None:
    """Keep a record of every request of this application, and give it to all listeners when the request has ended.

    Every answer gets X-Request-Id: the client's own, if it can be sent back safely, else a new one. Until the end,
    everything that is logged on behalf of the request bears it.
    """
    inner = app.asgi_app

    async def asgi_app(scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await inner(scope, receive, send)
            return
        record = _new_record(scope)
        _current.set(record)
        current_request_id.set(record.request_id)
        try:
            await inner(scope, _noting_departure(record, receive), _noting_answer(record, send))
        finally:
            record.ended_at = trio.current_time()
            for listener in listeners:
                _tell(listener, record)

    app.asgi_app = asgi_app  # type: ignore[method-assign]  # Quart's way to put something around it


def _new_record(scope: Any) -> RequestRecord:
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    return RequestRecord(
        request_id=request_name(headers.get("x-request-id", "")),
        method=scope["method"],
        path=scope["path"],
        headers=headers,
        client=_address(scope.get("client")),
        arrived=trio.current_time(),
        unix_time=time.time(),
    )


def _address(client: tuple[str, int] | None) -> str:
    if client is None:
        return ""
    host, port = client
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _noting_departure(record: RequestRecord, receive: Receive) -> Receive:
    async def receive_noting() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect" and not record.is_complete:
            record.client_left = True
        return message

    return receive_noting


def _noting_answer(record: RequestRecord, send: Send) -> Send:
    name = (b"x-request-id", record.request_id.encode())

    async def send_noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            message = {**message, "headers": [*message["headers"], name]}
        elif message["type"] == "http.response.body":
            if body := message.get("body"):
                record.num_bytes += len(body)
                if record.first_byte_at is None:
                    record.first_byte_at = trio.current_time()
            # before it is sent: from inside of the last `send`, Hypercorn says that the client has left
            record.is_complete = not message.get("more_body", False)
        await send(message)

    return send_noting


def _tell(listener: Listener, record: RequestRecord) -> None:
    """What is told of a request may not harm it."""
    try:
        listener(record)
    except Exception as error:
        _log.error("a request's record was lost", exc_info=error)
