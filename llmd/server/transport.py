"""A connection's bytes to and from the kernel: at once where it has room, with a time limit where it has not.

Knows no protocol. `tls.TlsTransport` has the same methods and stands in front of this one.
"""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import trio

# bytes read at once
MAX_RECEIVE = 1 << 16
# writes without a checkpoint, before other tasks must get their turn
MAX_DIRECT_WRITES = 32


class Transport(Protocol):
    """One client's bytes. Any task may send; only one receives."""

    async def receive(self) -> bytes:
        """What has come in; nothing once the client has ended. Raises trio.BrokenResourceError or ClosedResourceError
        if the connection is no more."""
        ...

    async def send(self, data: bytes) -> None:
        """Hand bytes on, in the order of the calls. Does nothing if the client is gone."""
        ...

    async def end(self) -> None:
        """Tell the client that nothing more is sent. What it still sends is received, but need not make sense."""
        ...

    def close(self) -> None: ...


class SocketTransport:
    """Bytes as they are, on a socket.

    A client that takes nothing for the write timeout is cut off; so is one to whom a cancelled writer left half a
    message. Then `on_cut_off` is called, once at least, and sending does nothing any more.
    """

    def __init__(self, stream: trio.SocketStream, *, write_timeout: float, on_cut_off: Callable[[], None]) -> None:
        self._stream = stream
        self._socket = stream.socket
        self._write_timeout = write_timeout
        self._on_cut_off = on_cut_off
        self._sending = trio.Lock()
        self._num_direct_writes = 0

    async def receive(self) -> bytes:
        return bytes(await self._stream.receive_some(MAX_RECEIVE))

    async def send(self, data: bytes) -> None:
        if self._sending.locked():
            rest: bytes | memoryview = data
        else:
            rest = self._write_now(data)
        if not rest:
            await self._give_way()
            return
        try:
            async with self._sending:
                while rest := self._write_now(rest):
                    with trio.fail_after(self._write_timeout):
                        await trio.lowlevel.wait_writable(self._socket)
        except (trio.TooSlowError, trio.ClosedResourceError):
            self._cut_off()
        except trio.Cancelled:
            self._cut_off()
            raise

    def send_last(self, data: bytes) -> None:
        """The last bytes before `close`, if there is room for them right now."""
        if not self._sending.locked():
            self._write_now(data)

    async def end(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()

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
        self._socket.close()
        self._on_cut_off()
