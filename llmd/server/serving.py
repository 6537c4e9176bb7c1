"""Serves an application on listening sockets: accepts, reads, writes, and ends in good order. Knows no route."""

import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr

from llmd.config import SECONDS, HttpConfig
from llmd.server.connection import OpenRequests
from llmd.server.http1 import Http1Protocol

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]

# bytes read at once
MAX_RECEIVE = 1 << 16
# for a client to read the answer before its unread upload makes the kernel reset the connection
LINGER = 2 * SECONDS
# for the last words of what a shutdown cuts short
CUT_GRACE = 1 * SECONDS
# writes without a checkpoint, before other tasks must get their turn
MAX_DIRECT_WRITES = 32

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

    After `stop`, connections that wait for a request are closed, and every other one after its answer. What is not done
    after `config.drain_timeout` seconds is ended with an error. No connection can end another one, or this function.
    """
    open_requests = OpenRequests()
    connections: set[_Connection] = set()
    context = WorkerContext(max_requests=None)
    wrapped_app, hypercorn_config = ASGIWrapper(app), _hypercorn_config(config)

    async def serve_connection(stream: trio.SocketStream) -> None:
        connection = _Connection(wrapped_app, hypercorn_config, context, stream, config, open_requests)
        connections.add(connection)
        try:
            await connection.run()
        except* Exception as errors:
            _log.error("a connection failed", exc_info=errors)
        finally:
            connections.discard(connection)

    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(each)) for each in sockets]
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve_connection, listeners)
        task_status.started()
        await stop.wait()
        await context.terminated.set()
        for connection in connections:
            connection.close_if_idle()
        with trio.move_on_after(config.drain_timeout):
            await open_requests.wait_none()
        open_requests.cut_all()
        with trio.move_on_after(CUT_GRACE):
            await open_requests.wait_none()
        nursery.cancel_scope.cancel()


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
        open_requests: OpenRequests,
    ) -> None:
        self._app = app
        self._hypercorn_config = hypercorn_config
        self._context = context
        self._stream = stream
        self._socket = stream.socket
        self._keep_alive_timeout = config.keep_alive_timeout
        self._write_timeout = config.write_timeout
        self._state = ConnectionState({"open_requests": open_requests})
        self._protocol: Http1Protocol
        # around the reader; its deadline is how long the connection may be idle
        self._reading = trio.CancelScope()
        self._writing = trio.Lock()
        self._num_direct_writes = 0
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
                self._protocol = self._make_protocol(tasks, client=client, server=server)
                self._note_idle(True)
                with self._reading:
                    await self._read()
                # who still works for this client hears that it is gone
                await self._protocol.handle(Closed())
        finally:
            self._socket.close()

    def close_if_idle(self) -> None:
        if self._idle:
            self._reading.cancel()

    def _make_protocol(self, tasks: TaskGroup, *, client: Any, server: Any) -> Http1Protocol:
        return Http1Protocol(
            self._app,
            self._hypercorn_config,
            context=self._context,
            tasks=tasks,
            state=self._state,
            client=parse_socket_addr(self._socket.family, client),
            server=parse_socket_addr(self._socket.family, server),
            send=self._send,
        )

    async def _read(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := bytes(await self._stream.receive_some(MAX_RECEIVE)):
                # after the last answer, reading on only lets the client finish its upload and read
                if not self._ending:
                    await self._protocol.handle(RawData(data))
            if not self._ending:
                await self._protocol.handle(RawData(b""))

    async def _send(self, event: Event) -> None:
        """What the protocol wants of the connection."""
        match event:
            case RawData(data=data):
                await self._write(data)
            case Updated(idle=idle):
                self._note_idle(idle)
            case Closed():
                self._end()
                await self._protocol.handle(Closed())

    def _note_idle(self, idle: bool) -> None:
        self._idle = idle
        self._reading.deadline = trio.current_time() + self._keep_alive_timeout if idle else float("inf")

    def _end(self) -> None:
        """No more answers: the client sees the end of the stream, and has a moment to close its side."""
        self._ending = True
        self._reading.deadline = trio.current_time() + LINGER
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    async def _write(self, data: bytes) -> None:
        """Hand bytes to the kernel: at once if it has room, else as the client reads. In order, also among tasks.

        A client that takes nothing for the write timeout is cut off; so is one to whom a cancelled writer left half a
        message. After that, writes do nothing, and the request hears of it through its disconnect.
        """
        if self._writing.locked():
            rest: bytes | memoryview = data
        else:
            rest = self._write_now(data)
        if not rest:
            await self._give_way()
            return
        try:
            async with self._writing:
                while rest := self._write_now(rest):
                    with trio.fail_after(self._write_timeout):
                        await trio.lowlevel.wait_writable(self._socket)
        except (trio.TooSlowError, trio.ClosedResourceError):
            self._cut_off()
        except trio.Cancelled:
            self._cut_off()
            raise

    def _write_now(self, data: bytes | memoryview) -> bytes | memoryview:
        """Write what the kernel takes; returns what it did not. Nothing is left over if the client is gone."""
        try:
            written = os.write(self._socket.fileno(), data)
        except BlockingIOError:
            return data
        except OSError:
            self._cut_off()
            return b""
        return memoryview(data)[written:]

    async def _give_way(self) -> None:
        """A checkpoint for cancellation always, and for the other tasks now and then: a full one costs as a write."""
        self._num_direct_writes += 1
        if self._num_direct_writes % MAX_DIRECT_WRITES == 0:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()

    def _cut_off(self) -> None:
        self._ending = True
        self._socket.close()
        self._reading.cancel()
