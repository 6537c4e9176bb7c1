"""Bytes over a stream with fewer turns of Trio's loop, and fewer layers, than the stream would take by itself: a step
of few sequences is little more than these. Knows nothing of what the bytes say.

Sockets are read and written directly; other streams, which tests use, by their own methods.
"""

import os

import trio


class Sender:
    """What the socket takes at once is sent when `put` returns, without a turn of Trio's loop; the rest is a task's."""

    def __init__(self, stream: trio.abc.SendStream) -> None:
        self._stream = stream
        self._socket = _socket_of(stream)
        self._rest = b""
        self._is_sending = False
        self._has_rest = trio.lowlevel.ParkingLot()
        self._all_sent = trio.lowlevel.ParkingLot()

    @property
    def has_sent_all(self) -> bool:
        return not self._rest and not self._is_sending

    def put(self, data: bytes) -> None:
        """Send this after all that was put before. Never raises: what goes wrong, `send_rest` finds out."""
        if self.has_sent_all:
            data = data[self._write(data) :]
        if data:
            self._rest += data
            self._has_rest.unpark()

    async def send_rest(self) -> None:
        """Wait until the stream did not take something at once, and send that. To be called again and again.

        Raises trio.BrokenResourceError if nobody is there any more.
        """
        if not self._rest:
            await self._has_rest.park()
        rest, self._rest = self._rest, b""
        self._is_sending = True
        await self._stream.send_all(rest)
        self._is_sending = False
        if self.has_sent_all:
            self._all_sent.unpark_all()

    async def wait_all_sent(self) -> None:
        while not self.has_sent_all:
            await self._all_sent.park()

    def _write(self, data: bytes) -> int:
        """How many bytes the socket takes without waiting."""
        if self._socket is None:
            return 0
        try:
            return os.write(self._socket.fileno(), data)
        except OSError:
            return 0


async def receive_some(stream: trio.abc.ReceiveStream, max_bytes: int) -> bytes | bytearray:
    """What has come; b"" if the stream has ended. Raises trio.BrokenResourceError if it is broken."""
    socket = _socket_of(stream)
    if socket is None:
        return await stream.receive_some(max_bytes)
    while True:
        await trio.lowlevel.wait_readable(socket)
        try:
            return os.read(socket.fileno(), max_bytes)
        except BlockingIOError:
            continue
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error


def _socket_of(stream: object) -> trio.socket.SocketType | None:
    return stream.socket if isinstance(stream, trio.SocketStream) else None
