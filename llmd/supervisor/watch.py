"""One child as the supervisor sees it: what it says, how long it has said nothing, and how it ended.

Knows nothing of what the child is for.
"""

import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress

import trio

from llmd.config import SECONDS
from llmd.protocol.control import BEAT_INTERVAL, Beat, ChildReady, ChildToSupervisor, SystemState
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.supervisor.processes import Process

# Loading a shared library holds the interpreter's lock, and a disk or network that is cold can make that take long:
# until a child is ready, it may be silent for so many times as long as later.
_LOADING_PATIENCE = 6
# for the stack of a process that hangs to be printed
_STACK_GRACE = 0.5 * SECONDS
# from the end of the control socket to the end of the process
_END_GRACE = 0.5 * SECONDS
_RECEIVE_SIZE = 1 << 16  # bytes


class Child:
    """A child process that runs.

    `take_in` is called with everything it says; it must not raise. `report` gets lines for the operator. A child that
    says nothing for `hang_timeout` seconds is ended; `suspect` is told when half of that has passed, and when it
    was in vain.
    """

    def __init__(
        self,
        process: Process,
        take_in: Callable[[ChildToSupervisor], None],
        *,
        hang_timeout: float,
        report: Callable[[str], None],
        suspect: Callable[[bool], None] = lambda silent: None,
    ) -> None:
        process.control.setblocking(False)
        self._process = process
        self._control = trio.SocketStream(trio.socket.from_stdlib_socket(process.control))
        self._decoder: FrameDecoder[ChildToSupervisor] = FrameDecoder(ChildToSupervisor)
        self._take_in = take_in
        self._report = report
        self._suspect = suspect
        self._hang_timeout = hang_timeout
        self._silence_allowed = _LOADING_PATIENCE * hang_timeout
        self._num_silent_ticks = 0

    async def run(self) -> None:
        """Listen to it until it is gone. On leaving, however that comes, it is ended and reaped."""
        grace = 0.0
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_if_silent)
                await self._listen()
                # its own exit status says more than that of the signal that would end it now
                grace = _END_GRACE
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                # a thread, so that the moments until it is gone do not stop the others
                await trio.to_thread.run_sync(_end, self._process.popen, grace)
                self._take_in_last_words()
                await trio.aclose_forcefully(self._control)

    async def tell(self, state: SystemState) -> None:
        """Raises trio.BrokenResourceError if it is gone."""
        try:
            await self._control.send_all(encode_frame(state))
        except trio.ClosedResourceError as error:
            # `run` has found its end first
            raise trio.BrokenResourceError(f"{name_of(self._process)} is gone") from error

    async def _listen(self) -> None:
        while True:
            try:
                data = await self._control.receive_some(_RECEIVE_SIZE)
            except trio.BrokenResourceError:
                return
            if not data:
                return
            self._num_silent_ticks = 0
            self._feed(data)

    def _feed(self, data: bytes | bytearray) -> None:
        for message in self._decoder.feed(data):
            if isinstance(message, Beat):
                continue
            if isinstance(message, ChildReady):
                self._silence_allowed = self._hang_timeout
            self._take_in(message)

    def _take_in_last_words(self) -> None:
        """What came in while nobody listened any more: perhaps the reason of it all."""
        with suppress(OSError):
            while data := self._process.control.recv(_RECEIVE_SIZE):
                self._feed(data)

    async def _end_if_silent(self) -> None:
        """Count beats that did not come, and not the time, so that a machine that sleeps or is paused ends nobody."""
        suspected = False
        while True:
            await trio.sleep(BEAT_INTERVAL)
            self._num_silent_ticks += 1
            # the first tick may have come right after a message
            silence = (self._num_silent_ticks - 1) * BEAT_INTERVAL
            if silence >= self._silence_allowed:
                break
            if suspected is not (silence > self._silence_allowed / 2):
                suspected = not suspected
                self._suspect(suspected)
        self._report(f"{name_of(self._process)} has given no sign of life for {silence:g} s: replacing it")
        self._process.popen.send_signal(signal.SIGABRT)
        await trio.sleep(_STACK_GRACE)
        self._process.popen.kill()


def name_of(process: Process) -> str:
    """As the operator reads it, e.g. "worker 1234"."""
    return f"{process.name} {process.popen.pid}"


def how_ended(process: Process, *, reason: str | None = None) -> str:
    """What became of a process that is reaped, e.g. "worker 1234 was ended by SIGKILL", or the reason it gave."""
    status = process.popen.returncode
    if reason is not None:
        return f"{name_of(process)} gave up: {reason}"
    if status >= 0:
        return f"{name_of(process)} ended with status {status}"
    names = {each.value: each.name for each in signal.Signals}
    return f"{name_of(process)} was ended by {names.get(-status, f'signal {-status}')}"


def _end(popen: subprocess.Popen[bytes], grace: float) -> None:
    """Let it end by itself, or else kill it; reap it."""
    if grace:
        with suppress(subprocess.TimeoutExpired):
            popen.wait(grace)
    popen.kill()
    popen.wait()
