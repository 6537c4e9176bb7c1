"""What every child process does: it ties its life to the supervisor's, fetches its configuration, gives signs of life.

Knows nothing of what the child is for.
"""

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from typing import TypeVar

import msgspec

from llmd.protocol.control import BEAT_INTERVAL, Beat, ChildToSupervisor, SystemState
from llmd.protocol.framing import FrameDecoder, encode_frame

ChildConfig = TypeVar("ChildConfig")
ControlMessage = TypeVar("ControlMessage")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_RECEIVE_SIZE = 1 << 16  # bytes
_STDERR = 2  # file descriptor


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however it dies (Linux; elsewhere a no-op).

    The kernel means the *thread* that started this process, so a parent must start its children from its main thread
    (`trio.run_process` does not: it starts them from a worker thread that ends when it was idle for a while).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


class ControlChannel:
    """A child's end of the control socket. Made by `connect_control`. Any thread may send."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        # the first frame has another type than the rest, so that frames are cut first and decoded when asked for
        self._frames: FrameDecoder[msgspec.Raw] = FrameDecoder(msgspec.Raw)
        self._received: deque[msgspec.Raw] = deque()

    def send(self, message: ChildToSupervisor) -> None:
        """Tell the supervisor. Messages are small and it always reads, so this does not wait in practice.

        Raises BrokenPipeError if the supervisor is gone.
        """
        with self._sending:
            self._connection.sendall(encode_frame(message))

    async def beat_in_loop(self) -> None:
        """Give signs of life (Trio) until cancelled: a blocked event loop gives none."""
        import trio

        while self._beat():
            await trio.sleep(BEAT_INTERVAL)

    def beat_in_thread(self) -> None:
        """Give signs of life from a thread of its own, for a process whose main thread is busy for long at a time.

        The process ends when the supervisor is gone, even if it has nobody else to notice that.
        """
        threading.Thread(target=self._beat_until_alone, name="beats", daemon=True).start()

    def _beat_until_alone(self) -> None:
        while self._beat():
            time.sleep(BEAT_INTERVAL)
        os._exit(1)

    def _beat(self) -> bool:
        """Send one sign of life, unless that would have to wait. False if the supervisor is gone."""
        # whoever sends at this moment is waited for by a supervisor that is stuck, or is a sign of life himself
        if not self._sending.acquire(blocking=False):
            return True
        try:
            # so small a frame is taken as a whole or not at all
            self._connection.send(encode_frame(Beat()), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            self._sending.release()
        return True

    def receive(self, message_type: type[ControlMessage]) -> ControlMessage | None:
        """Block until the supervisor sends the next message; None once it has closed the socket."""
        while not self._received:
            if not self._take_in():
                return None
        return msgspec.msgpack.decode(self._received.popleft(), type=message_type)

    async def wait_state(self) -> SystemState | None:
        """Wait (Trio) until the supervisor sends the next state; None once it has closed the socket."""
        import trio  # here, because workers and fetchers start faster without it

        while not self._received:
            await trio.lowlevel.wait_readable(self._connection)
            if not self._take_in():
                return None
        return msgspec.msgpack.decode(self._received.popleft(), type=SystemState)

    async def wait_closed(self) -> None:
        """Wait (Trio) until the supervisor closes the socket or dies; what it sends until then is dropped."""
        while await self.wait_state() is not None:
            pass

    def _take_in(self) -> bool:
        """Read what is there (blocks if nothing is); False at the end of the stream."""
        try:
            data = self._connection.recv(_RECEIVE_SIZE)
        except ConnectionResetError:
            data = b""
        self._received.extend(self._frames.feed(data))
        return bool(data)


def connect_control(fd: int, config_type: type[ChildConfig]) -> tuple[ChildConfig, ControlChannel]:
    """Become a child: the first call of its `main`, with the file descriptor of the control socket it was born with.

    It dies with its parent from now on and ignores SIGINT and SIGTERM: a terminal's Ctrl-C goes to the whole process
    group, an init system's SIGTERM to all processes of a service, and the supervisor is the one who decides what ends
    when. If it hangs, the supervisor's SIGABRT makes it print the stack of each thread. Blocks until the configuration,
    the first frame, is there.
    Raises ConnectionError if the supervisor closes the socket before that.
    """
    faulthandler.enable(file=_STDERR)
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = ControlChannel(socket.socket(fileno=fd))
    config = channel.receive(config_type)
    if config is None:
        raise ConnectionError("the supervisor closed the control socket before it sent the configuration")
    return config, channel
