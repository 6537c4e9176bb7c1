"""The ranks as the engine sees them: a plan goes to each, the result comes from the last stage.

Knows nothing of sequences. A lost rank ends the engine; the supervisor starts it anew, with its ranks.
"""

import math
from collections import deque
from collections.abc import Sequence

import msgspec
import trio

from llmd.engine.direct_io import Sender, receive_some
from llmd.errors import LlmdError
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.steps import RankFailed, RankReady, StepPlan, StepResult, WorkerToEngine

_RECEIVE_SIZE = 1 << 18  # bytes
# looks at the steps in flight within the time that a step may take
_LOOKS = 10


class RankLost(LlmdError):
    """A rank failed, hangs, or its connection ended: no step can run any more."""


class RankConnection:
    """The engine's end of one rank's socket."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._sender = Sender(stream)
        self._decoder: FrameDecoder[WorkerToEngine] = FrameDecoder(WorkerToEngine)
        self._received: deque[WorkerToEngine] = deque()
        self.name = "a rank that was still loading"

    async def wait_ready(self) -> RankReady:
        """Wait until the rank has loaded. Raises RankLost."""
        message = await self._receive()
        if not isinstance(message, RankReady):
            raise RankLost(f"{self.name} sent {type(message).__name__} before it was ready")
        self.name = f"rank {message.rank}"
        return message

    def send(self, frame: bytes) -> None:
        """Have it sent, now or by `run`."""
        self._sender.put(frame)

    async def run(self) -> None:
        """Send what does not go at once, until cancelled. Raises RankLost."""
        try:
            while True:
                await self._sender.send_rest()
        except trio.BrokenResourceError as error:
            raise RankLost(f"{self.name} is gone") from error

    async def wait_result(self) -> StepResult:
        """Wait for the result of the oldest step that has none yet. Raises RankLost."""
        message = await self._receive()
        if not isinstance(message, StepResult):
            raise RankLost(f"{self.name} sent {type(message).__name__} instead of a result")
        return message

    async def _receive(self) -> WorkerToEngine:
        while not self._received:
            try:
                data = await receive_some(self._stream, _RECEIVE_SIZE)
                self._received.extend(self._decoder.feed(data))
            except trio.BrokenResourceError:
                data = b""
            except msgspec.DecodeError as error:
                raise RankLost(f"{self.name} sent what is no message: {error}") from error
            if not data:
                raise RankLost(f"{self.name} is gone")
        message = self._received.popleft()
        if isinstance(message, RankFailed):
            raise RankLost(f"{self.name} failed: {message.message}")
        return message


class Ranks:
    """All ranks, loaded. Made by `connect_ranks`."""

    def __init__(
        self,
        connections: Sequence[RankConnection],
        *,
        num_blocks: int,
        max_model_len: int,
        vocab_size: int,
        step_timeout: float,
    ) -> None:
        self._connections = connections
        self._step_timeout = step_timeout
        self._num_plans = 0
        self._num_results = 0
        self.num_blocks = num_blocks  # KV-cache blocks that every rank has
        self.max_model_len = max_model_len  # the context that every rank allows
        self.vocab_size = vocab_size  # token ids that every rank knows are below this

    def send(self, plan: StepPlan) -> None:
        """Have every rank run a step. May be called again before the result is there. `run` must run."""
        self._num_plans += 1
        frame = encode_frame(plan)
        for connection in self._connections:
            connection.send(frame)

    async def wait_result(self) -> StepResult:
        """Wait for the result of the oldest step that has none yet, from the last stage. Raises RankLost."""
        result = await self._connections[-1].wait_result()
        self._num_results += 1
        return result

    async def run(self) -> None:
        """Until cancelled, send what does not go at once, and raise RankLost as soon as a rank is lost whose results
        nobody waits for, or when the oldest step in flight has had no result for the step timeout.
        """
        async with trio.open_nursery() as nursery:
            for connection in self._connections:
                nursery.start_soon(connection.run)
            if self._step_timeout < math.inf:
                nursery.start_soon(self._watch_progress)
            for connection in self._connections[:-1]:
                nursery.start_soon(_watch_one, connection)

    async def _watch_progress(self) -> None:
        # counts its own looks and not the time, so that a machine that sleeps or is paused loses no rank
        num_results, num_fruitless = 0, 0
        while True:
            await trio.sleep(self._step_timeout / _LOOKS)
            if self._num_plans == self._num_results or self._num_results > num_results:
                num_results, num_fruitless = self._num_results, 0
                continue
            num_fruitless += 1
            # the first look may have come right after the step began
            if num_fruitless > _LOOKS:
                name = self._connections[-1].name
                raise RankLost(f"{name} has not finished a step for {self._step_timeout:g} s")


async def connect_ranks(streams: Sequence[trio.abc.Stream], *, step_timeout: float = math.inf) -> Ranks:
    """Wait until the rank at the other end of each stream has loaded. Raises RankLost as soon as one is lost.

    A step may take `step_timeout` seconds before its rank counts as lost.
    """
    ready: dict[int, tuple[RankReady, RankConnection]] = {}

    async def wait_one(connection: RankConnection) -> None:
        message = await connection.wait_ready()
        ready[message.rank] = message, connection

    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(wait_one, RankConnection(stream))
    if sorted(ready) != list(range(len(streams))):
        raise RankLost(f"{len(streams)} ranks connected, but only the numbers {sorted(ready)}")
    messages = [ready[rank][0] for rank in range(len(streams))]
    return Ranks(
        [ready[rank][1] for rank in range(len(streams))],
        num_blocks=min(message.num_blocks for message in messages),
        max_model_len=min(message.max_model_len for message in messages),
        vocab_size=min(message.vocab_size for message in messages),
        step_timeout=step_timeout,
    )


async def _watch_one(connection: RankConnection) -> None:
    while True:
        await connection.wait_result()
