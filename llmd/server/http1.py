"""Hypercorn's HTTP/1.1 protocol with its sharp edges off. Knows nothing of sockets or of the application."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import chain

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, EndBody, Response
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.typing import AppWrapper, ConnectionState, H11SendableEvent, TaskGroup, WorkerContext
from werkzeug.exceptions import BadRequest, HTTPException, default_exceptions

from llmd.server.error_handlers import Rendered, render
from llmd.server.request_headers import request_name

# bytes that a client may send ahead of the answer that it still waits for
MAX_PIPELINED = 1 << 16


class Http1Protocol(H11Protocol):
    """One connection's requests, one after the other.

    Other than in Hypercorn's own class no request can change the protocol (an `Upgrade` is ignored, as RFC 9110
    section 7.8 allows), bad HTTP is answered with the OpenAI error object, and the reader keeps reading while a request
    runs, so that a client's leaving is seen even if it had sent its next request already.
    """

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        *,
        context: WorkerContext,
        tasks: TaskGroup,
        state: ConnectionState,
        is_encrypted: bool,
        client: tuple[str, int] | None,
        server: tuple[str, int] | None,
        send: Callable[[Event], Awaitable[None]],
    ) -> None:
        super().__init__(app, config, context, tasks, state, is_encrypted, client, server, send)
        self._closed = False
        # the reader and the end of a request both parse what has come in
        self._parsing = trio.Lock()
        # the head of an answer whose body is at hand: both go out in one write
        self._held_head = b""

    async def handle(self, event: Event) -> None:
        """Take in bytes, or the end of the connection. Waits while too much is pipelined."""
        if isinstance(event, RawData):
            self.connection.receive_data(event.data)
            await self._handle_events()
            if self.stream is not None and self._num_pipelined() > MAX_PIPELINED:
                await self.can_read.wait()
        elif isinstance(event, Closed):
            self._closed = True
            await self.can_read.set()
            await self._close_stream()

    def drain(self) -> None:
        """Nothing to say now: the word that a connection ends comes with its next answer, see `stream_send`."""

    def _num_pipelined(self) -> int:
        return len(self.connection.trailing_data[0])

    async def _handle_events(self) -> None:
        async with self._parsing:
            while not self._closed and await self._handle_next_event():
                pass

    async def _handle_next_event(self) -> bool:
        """One event of the bytes so far; False if there is none, or none may be taken yet."""
        if self.connection.they_are_waiting_for_100_continue:
            headers = self.config.response_headers("h11")
            await self._send_h11_event(h11.InformationalResponse(status_code=100, headers=headers))
        try:
            event = self.connection.next_event()
            if isinstance(event, h11.Request):
                _check(event)
        except h11.RemoteProtocolError as error:
            await self._refuse(error)
            return False
        if isinstance(event, h11.Request):
            await self.can_read.clear()
            await self.send(Updated(idle=False))
            await self._create_stream(_without_upgrade(event))
        elif isinstance(event, h11.Data) and self.stream is not None:
            await self.stream.handle(Body(stream_id=STREAM_ID, data=event.data))
        elif isinstance(event, h11.EndOfMessage) and self.stream is not None:
            await self.stream.handle(EndBody(stream_id=STREAM_ID))
        else:  # NEED_DATA, ConnectionClosed, or PAUSED until the request that runs is answered
            return False
        return True

    async def stream_send(self, event: StreamEvent) -> None:
        """Send what the application answers, with the word that nothing comes after it while the server drains, and
        where the answer came before the end of the request: what is left of it is not read."""
        is_early = self.connection.their_state is h11.SEND_BODY
        if isinstance(event, Response) and (is_early or self.context.terminated.is_set()):
            event = replace(event, headers=[*event.headers, (b"connection", b"close")])
        await super().stream_send(event)

    async def _send_h11_event(self, event: H11SendableEvent) -> None:
        """Write an event, but the head of an answer of known length together with what follows it.

        A task may have been cancelled before it writes its first byte, and notices that only after it: the client
        (which had closed its side for sending, say) got a head without a body. So it gets the whole, or nothing.
        """
        try:
            data = self.connection.send(event)
        except h11.LocalProtocolError:
            if self.connection.their_state is not h11.ERROR:
                raise
            return
        if isinstance(event, h11.Response) and any(name == b"content-length" for name, _ in event.headers):
            self._held_head = data
            return
        head, self._held_head = self._held_head, b""
        await self.send(RawData(head + data))

    async def _maybe_recycle(self) -> None:
        await super()._maybe_recycle()
        if self._num_pipelined():
            self.task_group.spawn(self._handle_events)

    async def _refuse(self, error: h11.RemoteProtocolError) -> None:
        """Say what is wrong with these bytes, unless an answer is under way, and close."""
        if self.connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            reason = default_exceptions.get(error.error_status_hint, BadRequest)
            await self._send_error(reason(f"This is not HTTP/1.1 that can be understood: {error}."))
        await self.send(Closed())

    async def _send_error(self, error: HTTPException) -> None:
        rendered = render(error)
        headers = list(chain(_refusal_headers(rendered), self.config.response_headers("h11")))
        await self._send_h11_event(h11.Response(status_code=rendered.status, headers=headers))
        await self._send_h11_event(h11.Data(data=rendered.body))
        await self._send_h11_event(h11.EndOfMessage())


def refusal(error: HTTPException) -> bytes:
    """The whole answer to somebody with whom there is no connection to speak of."""
    rendered = render(error)
    lines = [b"%b: %b\r\n" % header for header in _refusal_headers(rendered)]
    return b"HTTP/1.1 %d \r\n%b\r\n%b" % (rendered.status, b"".join(lines), rendered.body)


def _refusal_headers(rendered: Rendered) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(rendered.body)),
        (b"x-request-id", request_name().encode()),
        (b"connection", b"close"),
    ]


def _check(request: h11.Request) -> None:
    """Raise h11.RemoteProtocolError for what h11 lets pass and this server does not."""
    if request.http_version not in {b"1.0", b"1.1"}:
        raise h11.RemoteProtocolError("only HTTP/1.0 and HTTP/1.1 are spoken here", error_status_hint=505)
    names = {name for name, _ in request.headers}
    if {b"content-length", b"transfer-encoding"} <= names:
        # two opinions on where the request ends are how requests are smuggled (RFC 9112 section 11.2)
        raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding are given")


def _without_upgrade(request: h11.Request) -> h11.Request:
    headers = [(name, value) for name, value in request.headers if name != b"upgrade"]
    if len(headers) == len(request.headers):
        return request
    return h11.Request(method=request.method, target=request.target, headers=headers, http_version=request.http_version)
