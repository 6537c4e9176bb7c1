"""Every sequence ends exactly once, in whatever order engines come, die and fail, clients leave and deadlines pass."""

import math
from collections import defaultdict
from contextlib import suppress

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.generation import (
    CancelRequest,
    EngineReady,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    ServerToEngine,
    StepEvents,
    TokenEvent,
)
from llmd.server.engine_client import EngineClient, Generation, SequenceStart

NUM_REQUESTS = 3
NUM_SEQUENCES = 2  # of each request
READY = EngineReady(max_model_len=512, block_size=16, num_blocks=64, vocab_size=264)

REQUESTS = st.integers(0, NUM_REQUESTS - 1)
MOVES = st.lists(
    st.one_of(
        st.just(("engine is replaced",)),
        st.sampled_from([("engine comes",), ("engine is ready",), ("engine dies",), ("engine starts all",), ("fail",)]),
        st.tuples(st.sampled_from(["token", "finish", "error"]), REQUESTS, st.integers(0, NUM_SEQUENCES - 1)),
        st.tuples(st.sampled_from(["ask", "leave", "deadline"]), REQUESTS),
    ),
    max_size=40,
)


class Story:
    """An engine client between an engine and clients that the test moves."""

    def __init__(self, nursery: trio.Nursery, clock: trio.testing.MockClock) -> None:
        self.clock = clock
        self._nursery = nursery
        self.client = EngineClient("nowhere", connect=self._connect)
        self._streams, self._new_streams = trio.open_memory_channel[trio.abc.Stream](math.inf)
        self._engine: trio.StapledStream[trio.abc.SendStream, trio.abc.ReceiveStream] | None = None
        self._is_ready = False
        self._submitted: dict[int, GenerateRequest] = {}  # what the engine of now has open
        self.generations: dict[int, Generation] = {}
        self.left: set[int] = set()
        self.heard: dict[tuple[int, int], list[TokenEvent]] = defaultdict(list)

    async def _connect(self, _: str) -> trio.abc.Stream:
        return await self._new_streams.receive()

    async def _listen(self, engine: trio.abc.ReceiveStream) -> None:
        decoder: FrameDecoder[ServerToEngine] = FrameDecoder(ServerToEngine)
        with suppress(trio.ClosedResourceError):
            async for data in engine:
                for message in decoder.feed(data):
                    if isinstance(message, CancelRequest):
                        self._submitted.pop(message.request_id, None)
                    else:
                        assert message.request_id not in self._submitted
                        number, index = message.prompt_token_ids
                        # it goes on where the client is
                        assert message.output_token_ids == self._tokens(number, index)
                        self._submitted[message.request_id] = message

    async def settle(self) -> None:
        """Everything that has been said is heard on both sides."""
        await trio.testing.wait_all_tasks_blocked()
        for number, generation in self.generations.items():
            for index, event in generation.take_pending():
                self.heard[number, index].append(event)

    async def move(self, move: tuple[object, ...]) -> None:
        match move:
            case ("token" | "finish" | "error" as what, int(number), int(index)):
                await self._end_or_go_on(what, number, index)
            case (str(what), int(number)):
                self._move_client(what, number)
            case ("fail",):
                self.client.fail_all("hopeless")
            case ("engine is replaced",):
                for name in ("engine dies", "engine comes", "engine is ready"):
                    await self.move((name,))
            case (str(what),):
                await self._move_engine(what)
        await self.settle()

    async def _move_engine(self, what: str) -> None:
        match what:
            case "engine comes" if self._engine is None:
                self._engine, theirs = trio.testing.memory_stream_pair()
                self._nursery.start_soon(self._listen, self._engine)
                self._streams.send_nowait(theirs)
                # it may be waiting to try again
                self.clock.jump(2)
            case "engine is ready" if self._engine is not None and not self._is_ready:
                self._is_ready = True
                await self._engine.send_all(encode_frame(READY))
            case "engine dies" if self._engine is not None:
                await self._engine.aclose()
                self._engine, self._is_ready = None, False
                self._submitted.clear()
            case "engine starts all":
                await self._say(StepEvents(started=list(self._submitted)))

    def _move_client(self, what: str, number: int) -> None:
        match what:
            case "ask" if number not in self.generations:
                sampling, deadline = SamplingParams(max_tokens=99, seed=0), 1000.0 + number
                starts = [SequenceStart([number, i], sampling, deadline=deadline) for i in range(NUM_SEQUENCES)]
                self.generations[number] = self.client.generate(starts)
            case "leave" if number in self.generations:
                self.left.add(number)
                self.generations[number].__exit__(None, None, None)
            case "deadline":
                self.clock.jump(max(0.0, 1000 + number - trio.current_time()))

    async def _end_or_go_on(self, what: str, number: int, index: int) -> None:
        for request_id, request in list(self._submitted.items()):
            if request.prompt_token_ids == [number, index]:
                finish = {"finish": FinishReason.LENGTH, "error": FinishReason.ERROR}.get(what)
                if finish is not None:
                    del self._submitted[request_id]
                token_ids = [] if what == "error" else [len(self._tokens(number, index))]
                await self._say(
                    StepEvents(events=[TokenEvent(request_id=request_id, token_ids=token_ids, finish=finish)])
                )
                return

    async def _say(self, events: StepEvents) -> None:
        if self._engine is not None and self._is_ready:
            await self._engine.send_all(encode_frame(events))

    def _tokens(self, number: int, index: int) -> list[int]:
        return [token_id for event in self.heard[number, index] for token_id in event.token_ids]

    def check(self) -> None:
        """No second end, nothing after the end, no token twice."""
        for (number, index), events in self.heard.items():
            assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
            assert self._tokens(number, index) == list(range(len(self._tokens(number, index))))

    async def finish(self) -> None:
        """An engine comes that answers everything; then whoever did not leave has an end, unless time has passed."""
        for name in ("engine comes", "engine is ready"):
            await self.move((name,))
        for number in range(NUM_REQUESTS):
            for index in range(NUM_SEQUENCES):
                await self.move(("finish", number, index))
        self.check()
        for number in self.generations.keys() - self.left:
            for index in range(NUM_SEQUENCES):
                events = self.heard[number, index]
                is_late = trio.current_time() >= 1000 + number
                assert is_late or (events and events[-1].finish is not None)
        for generation in self.generations.values():
            generation.__exit__(None, None, None)
        assert self.client.num_open == 0
        assert (self.client.backlog.num_sequences, self.client.backlog.num_clients) == (0, 0)


@settings(max_examples=150, deadline=None)
@given(MOVES)
def test_every_sequence_ends_once(moves: list[tuple[object, ...]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            story = Story(nursery, clock)
            nursery.start_soon(story.client.run)
            for number in range(NUM_REQUESTS - 1):
                await story.move(("ask", number))
            for move in moves:
                await story.move(move)
                story.check()
            await story.finish()
            nursery.cancel_scope.cancel()

    clock = trio.testing.MockClock()
    trio.run(main, clock=clock)
