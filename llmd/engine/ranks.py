"""The ranks as the engine sees them: a plan goes to each, the result comes from the last stage.

Knows nothing of sequences. A lost rank ends the engine; the supervisor starts it anew, with its ranks.
"""

from collections import deque
from collections.abc import Sequence

import msgspec
import trio

from llmd.errors import LlmdError
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.steps import RankFailed, RankReady, StepPlan, StepResult, WorkerToEngine

_RECEIVE_SIZE = 1 << 18  # bytes


class RankLost(LlmdError):
    """A rank failed or its connection ended: no step can run any more."""


class RankConnection:
    """The engine's end of one rank's socket."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
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

    async def send(self, frame: bytes) -> None:
        """Raises RankLost."""
        try:
            await self._stream.send_all(frame)
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
                data = await self._stream.receive_some(_RECEIVE_SIZE)
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
        self, connections: Sequence[RankConnection], *, num_blocks: int, max_model_len: int, vocab_size: int
    ) -> None:
        self._connections = connections
        self.num_blocks = num_blocks  # KV-cache blocks that every rank has
        self.max_model_len = max_model_len  # the context that every rank allows
        self.vocab_size = vocab_size  # token ids that every rank knows are below this

    async def send(self, plan: StepPlan) -> None:
        """Have every rank run a step. May be called again before the result is there. Raises RankLost."""
        frame = encode_frame(plan)
        for connection in self._connections:
            await connection.send(frame)

    async def wait_result(self) -> StepResult:
        """Wait for the result of the oldest step that has none yet, from the last stage. Raises RankLost."""
        return await self._connections[-1].wait_result()

    async def watch(self) -> None:
        """Run until cancelled, and raise RankLost as soon as a rank is lost whose results nobody waits for."""
        async with trio.open_nursery() as nursery:
            for connection in self._connections[:-1]:
                nursery.start_soon(_watch_one, connection)


async def connect_ranks(streams: Sequence[trio.abc.Stream]) -> Ranks:
    """Wait until the rank at the other end of each stream has loaded. Raises RankLost as soon as one is lost."""
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
    )


async def _watch_one(connection: RankConnection) -> None:
    while True:
        await connection.wait_result()
