"""Serves an application on listening sockets: accepts, reads, writes, and ends in good order. Knows no route."""

import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr
from werkzeug.exceptions import BadRequest

from llmd.config import SECONDS, HttpConfig
from llmd.server.accepting import accept_connections
from llmd.server.body_memory import BodyMemory
from llmd.server.connection import OpenRequests
from llmd.server.http1 import Http1Protocol, refusal
from llmd.server.transport import SocketTransport, Transport

if TYPE_CHECKING:
    # most servers run without TLS, and without it there is no HTTP/2: they start without waiting for these
    from llmd.server.http2 import Http2Protocol
    from llmd.server.tls import Certificates

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]

# for a client to agree on TLS
HANDSHAKE_TIMEOUT = 10 * SECONDS
# for a client to read the answer before its unread upload makes the kernel reset the connection
LINGER = 2 * SECONDS
# for the last words of what a shutdown cuts short
CUT_GRACE = 1 * SECONDS

_log = logging.getLogger(__name__)


async def serve(
    app: AsgiApp,
    config: HttpConfig,
    *,
    sockets: Sequence[socket.socket],
    stop: trio.Event,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on these listening sockets until `stop`, and then until no request is open.

    Until then nobody is turned away without an answer: new connections are taken and idle ones stay open, so that a
    probe or a late client hears from the application that it drains; but each gets only one more answer. (An idle one
    of HTTP/2 is closed: GOAWAY tells its client to come again on another.) What is not done `config.drain_timeout`
    seconds after `stop` is ended with an error. No connection can end another one, or this function.
    """
    open_requests = OpenRequests()
    body_memory = BodyMemory.for_bodies_of(config.max_body_bytes)
    connections: set[_Connection] = set()
    context = WorkerContext(max_requests=None)
    wrapped_app, hypercorn_config = ASGIWrapper(app), _hypercorn_config(config)
    certificates = _certificates(config)

    async def serve_connection(stream: trio.SocketStream) -> None:
        connection = _Connection(
            *(wrapped_app, hypercorn_config, context, stream, config),
            certificates=certificates,
            state=ConnectionState({"open_requests": open_requests, "body_memory": body_memory}),
        )
        connections.add(connection)
        try:
            await connection.run()
        except* Exception as errors:
            _log.error("a connection failed", exc_info=errors)
        finally:
            connections.discard(connection)

    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(each)) for each in sockets]
    async with trio.open_nursery() as nursery:
        await nursery.start(accept_connections, listeners, serve_connection)
        task_status.started()
        await stop.wait()
        await context.terminated.set()
        for connection in connections:
            connection.drain()
        with trio.move_on_after(config.drain_timeout):
            await open_requests.wait_none()
        open_requests.cut_all()
        with trio.move_on_after(CUT_GRACE):
            await open_requests.wait_none()
        nursery.cancel_scope.cancel()


def _certificates(config: HttpConfig) -> "Certificates | None":
    """None = no TLS."""
    if config.ssl_certfile is None:
        return None
    from llmd.server.tls import Certificates, TlsFiles

    return Certificates(TlsFiles.of(config))


def _hypercorn_config(config: HttpConfig) -> Config:
    """Every limit that Hypercorn's protocol classes look at, on purpose."""
    hypercorn = Config()
    hypercorn.errorlog = _log
    hypercorn.accesslog = None
    hypercorn.include_server_header = False
    hypercorn.h11_max_incomplete_size = 1 << 14
    hypercorn.keep_alive_max_requests = 1 << 62
    # Quart takes every event at once, and what it keeps is bounded by MAX_CONTENT_LENGTH
    hypercorn.max_app_queue_size = 1 << 62
    return hypercorn


class _Connection:
    """One client's socket, and the protocol between it and the application."""

    def __init__(
        self,
        app: ASGIWrapper,
        hypercorn_config: Config,
        context: WorkerContext,
        stream: trio.SocketStream,
        config: HttpConfig,
        *,
        certificates: "Certificates | None",
        state: ConnectionState,
    ) -> None:
        self._app = app
        self._hypercorn_config = hypercorn_config
        self._context = context
        self._socket = stream.socket
        self._certificates = certificates
        self._keep_alive_timeout = config.keep_alive_timeout
        self._write_timeout = config.write_timeout
        self._state = state
        self._transport: Transport = SocketTransport(
            stream, write_timeout=config.write_timeout, on_cut_off=self._note_cut_off
        )
        self._protocol: Http1Protocol | Http2Protocol | None = None
        # around the reader; its deadline is how long the connection may be idle
        self._reading = trio.CancelScope()
        self._idle = True
        self._ending = False

    async def run(self) -> None:
        """Until one of the two sides closes. Leaves no task behind."""
        try:
            client, server = self._socket.getpeername(), self._socket.getsockname()
        except OSError:
            self._socket.close()  # gone before it said anything
            return
        try:
            async with TaskGroup() as tasks:
                with self._reading, suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    alpn_protocol = await self._begin()
                    if not self._ending:
                        make = self._make_http2 if alpn_protocol == "h2" else self._make_http1
                        self._protocol = make(tasks, client=client, server=server)
                        self._note_idle(True)
                    await self._read()
                # who still works for this client hears that it is gone
                if self._protocol is not None:
                    await self._protocol.handle(Closed())
        finally:
            self._transport.close()

    def drain(self) -> None:
        """Have the client come again on another connection, where its protocol has a word for that."""
        if self._protocol is not None:
            self._protocol.drain()

    async def _begin(self) -> str | None:
        """Encrypt from here on, if that is wanted. Returns what the client wants to speak, if it says."""
        if self._certificates is None:
            return None
        from llmd.server.tls import HandshakeFailed, PlainHttp, TlsTransport

        assert isinstance(self._transport, SocketTransport)
        self._reading.deadline = trio.current_time() + min(HANDSHAKE_TIMEOUT, self._keep_alive_timeout)
        context = self._certificates.context()
        if context is None:
            raise trio.BrokenResourceError
        tls = TlsTransport(context, self._transport)
        try:
            await tls.handshake()
        except PlainHttp:
            error = BadRequest("This port speaks HTTPS: ask again with https:// before its name.")
            await self._transport.send(refusal(error))
            await self._end()
        except HandshakeFailed as error:
            _log.debug("a TLS handshake failed: %s", error)
            await self._end()
        else:
            self._transport = tls
        return tls.alpn_protocol

    def _make_http1(self, tasks: TaskGroup, *, client: Any, server: Any) -> Http1Protocol:
        return Http1Protocol(
            self._app,
            self._hypercorn_config,
            context=self._context,
            tasks=tasks,
            state=self._state,
            is_encrypted=self._certificates is not None,
            client=parse_socket_addr(self._socket.family, client),
            server=parse_socket_addr(self._socket.family, server),
            send=self._send,
        )

    def _make_http2(self, tasks: TaskGroup, *, client: Any, server: Any) -> "Http2Protocol":
        from llmd.server.http2 import Http2Protocol

        return Http2Protocol(
            self._app,
            self._hypercorn_config,
            context=self._context,
            tasks=tasks,
            state=self._state,
            client=parse_socket_addr(self._socket.family, client),
            server=parse_socket_addr(self._socket.family, server),
            send=self._send,
            write_timeout=self._write_timeout,
        )

    async def _read(self) -> None:
        while data := await self._transport.receive():
            # after the last answer, reading on only lets the client finish its upload and read
            if self._protocol is not None and not self._ending:
                await self._protocol.handle(RawData(data))
        if self._protocol is not None and not self._ending:
            await self._protocol.handle(RawData(b""))

    async def _send(self, event: Event) -> None:
        """What the protocol wants of the connection."""
        match event:
            case RawData(data=data):
                await self._transport.send(data)
            case Updated(idle=idle):
                self._note_idle(idle)
            case Closed():
                await self._end()
                assert self._protocol is not None
                await self._protocol.handle(Closed())

    def _note_idle(self, idle: bool) -> None:
        if self._ending:
            return
        self._idle = idle
        self._reading.deadline = trio.current_time() + self._keep_alive_timeout if idle else float("inf")

    async def _end(self) -> None:
        """No more answers: the client sees the end of the stream, and has a moment to close its side."""
        self._ending = True
        self._reading.deadline = trio.current_time() + LINGER
        await self._transport.end()

    def _note_cut_off(self) -> None:
        self._ending = True
        self._reading.cancel()
