"""The step loop over memory streams, with a fake rank behind it: no process, no socket, no clock."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
import trio
import trio.testing

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.loop import EngineLoop
from llmd.engine.ranks import RankLost, connect_ranks
from llmd.engine.scheduler import Scheduler
from llmd.engine.sequence import ConnectionId
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.generation import (
    STEP_TOKENS_BUCKETS,
    CancelRequest,
    EngineReady,
    EngineStatistics,
    EngineToServer,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    StepEvents,
    TokenEvent,
)
from llmd.protocol.steps import RankFailed, RankReady, StepPlan, StepResult
from tests.fakes import VOCAB_SIZE, FakeRank, expected_completion, serve_fake_rank

NUM_BLOCKS, BLOCK_SIZE, MAX_MODEL_LEN = 64, 4, 200


def generate(request_id: int, prompt: list[int], max_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens, seed=0)
    )


@dataclass
class Server:
    """The server's end of a connection."""

    stream: trio.abc.Stream
    decoder: FrameDecoder[EngineToServer] = field(default_factory=lambda: FrameDecoder(EngineToServer))
    received: list[EngineReady | StepEvents] = field(default_factory=list)

    async def send(self, *messages: object) -> None:
        await self.stream.send_all(b"".join(encode_frame(message) for message in messages))

    async def read(self) -> None:
        """Take in what comes next."""
        data = await self.stream.receive_some()
        assert data, "the engine closed the connection"
        self.received += self.decoder.feed(data)

    @property
    def frames(self) -> list[StepEvents]:
        return [message for message in self.received if isinstance(message, StepEvents)]

    def events(self, request_id: int) -> list[TokenEvent]:
        return [event for frame in self.frames for event in frame.all_events() if event.request_id == request_id]

    def statistics(self) -> EngineStatistics | None:
        """The latest."""
        return next((frame.statistics for frame in reversed(self.frames) if frame.statistics), None)

    async def read_until_end(self, request_id: int) -> tuple[list[int], FinishReason | None]:
        while not (events := self.events(request_id)) or events[-1].finish is None:
            await self.read()
        return [token_id for event in events for token_id in event.token_ids], events[-1].finish


@dataclass
class Engine:
    scheduler: Scheduler
    loop: EngineLoop
    ranks: list[trio.abc.Stream]  # the ranks' ends
    nursery: trio.Nursery

    def connect(self) -> Server:
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.loop.serve, theirs)
        return Server(ours)

    def statistics(self) -> EngineStatistics:
        return self.scheduler.statistics()


@asynccontextmanager
async def running_engine(*, num_ranks: int = 1, scheduler_type: type[Scheduler] = Scheduler) -> AsyncIterator[Engine]:
    """An engine whose ranks have just said that they are ready; the test plays them."""
    pairs = [trio.testing.memory_stream_pair() for _ in range(num_ranks)]
    for rank, (theirs, _) in enumerate(pairs):
        await theirs.send_all(
            encode_frame(
                RankReady(rank=rank, num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE)
            )
        )
    ranks = await connect_ranks([ours for _, ours in pairs])
    scheduler = scheduler_type(
        CacheConfig(block_size=BLOCK_SIZE),
        SchedulerConfig(),
        num_blocks=ranks.num_blocks,
        max_model_len=ranks.max_model_len,
    )
    ready = EngineReady(
        max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, vocab_size=VOCAB_SIZE
    )
    loop = EngineLoop(scheduler, ranks, ready=ready)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        yield Engine(scheduler, loop, [theirs for theirs, _ in pairs], nursery)
        nursery.cancel_scope.cancel()


async def answer_plans(stream: trio.abc.Stream, rank: FakeRank) -> None:
    decoder: FrameDecoder[StepPlan] = FrameDecoder(StepPlan)
    async for data in stream:
        for plan in decoder.feed(data):
            await stream.send_all(encode_frame(rank.execute(plan)))


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(20):
            await test()

    trio.run(bounded)


def test_a_request_streams_to_its_end() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            engine.nursery.start_soon(answer_plans, engine.ranks[0], FakeRank(BLOCK_SIZE))
            server = engine.connect()
            request = generate(7, [1, 2, 3, 4, 5], 12)
            await server.send(request)
            assert await server.read_until_end(7) == expected_completion(request)
            assert server.received[0] == EngineReady(
                max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, vocab_size=VOCAB_SIZE
            )
            assert [len(event.token_ids) for event in server.events(7)] == [1] * 12, "a frame a step"
            assert engine.statistics().num_free_blocks == NUM_BLOCKS

    run(test)


def test_two_connections_may_use_the_same_request_id() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            engine.nursery.start_soon(answer_plans, engine.ranks[0], FakeRank(BLOCK_SIZE))
            servers = [engine.connect(), engine.connect()]
            requests = [generate(1, [1, 2, 3], 9), generate(1, [3, 2, 1], 5)]
            for server, request in zip(servers, requests, strict=True):
                await server.send(request)
            for server, request in zip(servers, requests, strict=True):
                assert await server.read_until_end(1) == expected_completion(request)

    run(test)


def test_a_cancelled_request_gives_its_blocks_back_and_says_no_more() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            engine.nursery.start_soon(answer_plans, engine.ranks[0], FakeRank(BLOCK_SIZE))
            server = engine.connect()
            await server.send(generate(1, [1, 2, 3], 150))
            while not server.events(1):
                await server.read()
            await server.send(CancelRequest(1), generate(2, [4], 3))
            await server.read_until_end(2)
            assert engine.statistics().num_free_blocks == NUM_BLOCKS
            num_events = len(server.events(1))
            await server.send(generate(3, [5], 20))
            await server.read_until_end(3)
            assert len(server.events(1)) == num_events
            assert server.events(1)[-1].finish is None

    run(test)


def test_a_connection_that_ends_takes_its_requests_with_it() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            leaving, staying = engine.connect(), engine.connect()
            # no rank answers yet, so that both are surely under way when one server goes
            await leaving.send(generate(1, [1, 2, 3], 150), generate(2, [1, 2, 3, 4], 150))
            request = generate(1, [7, 7], 10)
            await staying.send(request)
            await trio.testing.wait_all_tasks_blocked()
            assert engine.statistics().num_running == 3
            await leaving.stream.aclose()
            await trio.testing.wait_all_tasks_blocked()
            assert engine.statistics().num_running == 1
            engine.nursery.start_soon(answer_plans, engine.ranks[0], FakeRank(BLOCK_SIZE))
            assert await staying.read_until_end(1) == expected_completion(request)
            assert engine.statistics().num_free_blocks == NUM_BLOCKS

    run(test)


def test_a_server_that_does_not_read_holds_up_nobody() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            # a stream without any room: sending to it waits until the other end reads
            ours, theirs = trio.testing.lockstep_stream_pair()
            engine.nursery.start_soon(engine.loop.serve, theirs)
            slow, quick = Server(ours), engine.connect()
            engine.nursery.start_soon(answer_plans, engine.ranks[0], FakeRank(BLOCK_SIZE))
            slow_request, quick_request = generate(1, [1, 2, 3], 60), generate(1, [1, 2, 4], 90)
            await slow.send(slow_request)
            await quick.send(quick_request)
            assert await quick.read_until_end(1) == expected_completion(quick_request)
            assert engine.statistics().num_free_blocks == NUM_BLOCKS, "its blocks do not wait for its reader"
            assert await slow.read_until_end(1) == expected_completion(slow_request)
            assert len(slow.received) < 60, "what it had not read came in fewer frames"

    run(test)


@pytest.mark.parametrize(
    "nonsense", [encode_frame("hello"), encode_frame(generate(1, [1], 100)) * 2], ids=["no message", "same id twice"]
)
def test_a_server_that_breaks_the_protocol_loses_its_connection_only(
    nonsense: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with running_engine() as engine:
            bad, good = engine.connect(), engine.connect()
            await bad.stream.send_all(nonsense)
            await trio.testing.wait_all_tasks_blocked()
            assert engine.statistics().num_running == 0
            with pytest.raises(trio.BrokenResourceError):
                await bad.send(generate(2, [1], 1))
            engine.nursery.start_soon(answer_plans, engine.ranks[0], FakeRank(BLOCK_SIZE))
            request = generate(1, [1], 5)
            await good.send(request)
            assert await good.read_until_end(1) == expected_completion(request)

    run(test)
    assert "closed the connection of a server" in caplog.text


def test_requests_that_end_at_once_are_answered_without_a_step() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            server = engine.connect()
            await server.send(generate(1, [0] * MAX_MODEL_LEN, 5))
            _, finish = await server.read_until_end(1)
            assert finish is FinishReason.ERROR
            assert "maximum context length is 200 tokens" in (server.events(1)[0].error or "")

    run(test)


def test_what_came_in_together_runs_together_and_steps_are_planned_ahead() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            server = engine.connect()
            await server.send(*(generate(i, [i], 8) for i in range(5)))
            plans: list[StepPlan] = []
            decoder: FrameDecoder[StepPlan] = FrameDecoder(StepPlan)
            await trio.testing.wait_all_tasks_blocked()
            plans += decoder.feed(await engine.ranks[0].receive_some())
            assert [plan.step_id for plan in plans] == [0, 1], "two steps in flight before any result"
            assert [len(plan.sequence_ids) for plan in plans] == [5, 5]

    run(test)


def test_the_engine_rests_when_there_is_nothing_to_do() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            rank = FakeRank(BLOCK_SIZE)
            engine.nursery.start_soon(answer_plans, engine.ranks[0], rank)
            server = engine.connect()
            await server.send(generate(1, [1, 2], 3))
            await server.read_until_end(1)
            # were the loop busy, this would never return
            await trio.testing.wait_all_tasks_blocked()
            assert rank.num_steps == 3
            while (statistics := server.statistics()) is None or statistics.num_output_tokens < 3:
                await server.read()
            assert (statistics.num_running, statistics.num_waiting) == (0, 0)

    run(test)


def test_statistics_come_at_intervals() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            rank, decoder = FakeRank(BLOCK_SIZE), FrameDecoder[StepPlan](StepPlan)

            async def answer_slowly() -> None:
                async for data in engine.ranks[0]:
                    for plan in decoder.feed(data):
                        await trio.sleep(0.05)
                        await engine.ranks[0].send_all(encode_frame(rank.execute(plan)))

            engine.nursery.start_soon(answer_slowly)
            server = engine.connect()
            await server.send(generate(1, [1], 40))
            await server.read_until_end(1)
            num_statistics = sum(frame.statistics is not None for frame in server.frames)
            # 40 steps take 2 s: every 0.2 s of them, with one more at either end
            assert 9 <= num_statistics <= 12

    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("lost_rank", [0, 1])
@pytest.mark.parametrize("farewell", [b"", encode_frame(RankFailed("out of memory"))], ids=["gone", "failed"])
def test_a_lost_rank_ends_the_engine(lost_rank: int, farewell: bytes) -> None:
    async def test() -> None:
        async with running_engine(num_ranks=2) as engine:
            await engine.connect().send(generate(1, [1], 5))
            await trio.testing.wait_all_tasks_blocked()
            if farewell:
                await engine.ranks[lost_rank].send_all(farewell)
            else:
                await engine.ranks[lost_rank].aclose()
            await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        run(test)
    cause = "failed: out of memory" if farewell else "is gone"
    assert caught.group_contains(RankLost, match=f"rank {lost_rank} {cause}")


def test_every_rank_gets_every_plan_and_the_last_one_answers() -> None:
    async def test() -> None:
        async with running_engine(num_ranks=2) as engine:
            first_rank = FakeRank(BLOCK_SIZE)

            async def run_silently() -> None:
                decoder: FrameDecoder[StepPlan] = FrameDecoder(StepPlan)
                async for data in engine.ranks[0]:
                    for plan in decoder.feed(data):
                        first_rank.execute(plan)

            engine.nursery.start_soon(run_silently)
            engine.nursery.start_soon(answer_plans, engine.ranks[1], FakeRank(BLOCK_SIZE))
            server = engine.connect()
            request = generate(1, [1, 2, 3], 6)
            await server.send(request)
            assert await server.read_until_end(1) == expected_completion(request)
            assert first_rank.num_steps == 6

    run(test)


def test_the_smallest_rank_decides_what_fits() -> None:
    async def test() -> None:
        pairs = [trio.testing.memory_stream_pair() for _ in range(2)]
        async with trio.open_nursery() as nursery:
            serve = partial(serve_fake_rank, rank=FakeRank(BLOCK_SIZE))
            nursery.start_soon(partial(serve, pairs[0][1], num_blocks=10, max_model_len=300, index=0))
            nursery.start_soon(partial(serve, pairs[1][1], num_blocks=12, max_model_len=200, index=1))
            ranks = await connect_ranks([ours for ours, _ in pairs])
            assert (ranks.num_blocks, ranks.max_model_len) == (10, 200)
            nursery.cancel_scope.cancel()

    run(test)


def test_a_rank_that_fails_while_loading_is_reported() -> None:
    async def test() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        loading, _ = trio.testing.memory_stream_pair()
        await theirs.send_all(encode_frame(RankFailed("no such file")))
        # the other one never gets ready
        await connect_ranks([loading, ours])

    with pytest.raises(BaseExceptionGroup) as caught:
        run(test)
    assert caught.group_contains(RankLost, match="no such file")


def test_who_begins_to_run_is_told_before_there_is_any_result() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            servers = [engine.connect(), engine.connect()]
            await servers[0].send(generate(5, [1], 3), generate(6, [2], 3))
            await trio.testing.wait_all_tasks_blocked()
            await servers[1].send(generate(5, [3], 3))
            # no rank answers yet
            while not any(frame.started for frame in servers[0].frames):
                await servers[0].read()
            assert [frame.started for frame in servers[0].frames if frame.started] == [[5, 6]]
            engine.nursery.start_soon(answer_plans, engine.ranks[0], FakeRank(BLOCK_SIZE))
            await servers[1].read_until_end(5)
            started = [position for position, frame in enumerate(servers[1].frames) if frame.started == [5]]
            first_token = min(position for position, frame in enumerate(servers[1].frames) if frame.num_tokens)
            assert len(started) == 1
            assert started[0] <= first_token

    run(test)


def test_what_servers_must_hear_is_sent_before_a_lost_rank_ends_the_engine() -> None:
    heard: list[StepEvents] = []

    async def test() -> None:
        async with running_engine() as engine, trio.open_nursery() as nursery:
            # a stream without any room: sending to it waits until the other end reads
            ours, theirs = trio.testing.lockstep_stream_pair()
            engine.nursery.start_soon(engine.loop.serve, theirs)
            server = Server(ours)
            await server.send(generate(1, [1, 2], 5))
            plans = list(FrameDecoder[StepPlan](StepPlan).feed(await engine.ranks[0].receive_some()))
            # the rank dies of the second step, and the server has not read a thing so far
            await engine.ranks[0].send_all(encode_frame(FakeRank(BLOCK_SIZE).execute(plans[0])))
            await trio.testing.wait_all_tasks_blocked()
            await engine.ranks[0].aclose()
            await trio.testing.wait_all_tasks_blocked()

            async def read_all() -> None:
                while data := await ours.receive_some():
                    heard.extend(message for message in server.decoder.feed(data) if isinstance(message, StepEvents))

            nursery.start_soon(read_all)

    with pytest.raises(BaseExceptionGroup) as caught:
        run(test)
    assert caught.group_contains(RankLost)
    assert [request_id for frame in heard for request_id in frame.started] == [1]
    expected = expected_completion(generate(1, [1, 2], 1)).token_ids
    assert [token_id for frame in heard for event in frame.all_events() for token_id in event.token_ids] == expected


class ChokingScheduler(Scheduler):
    """Has a bug that one request finds."""

    def add(self, request: GenerateRequest, *, connection: ConnectionId) -> TokenEvent | None:
        if request.prompt_token_ids == [13]:
            raise ZeroDivisionError("unlucky")
        return super().add(request, connection=connection)


def test_a_request_that_the_engine_chokes_on_ends_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with running_engine(scheduler_type=ChokingScheduler) as engine:
            engine.nursery.start_soon(answer_plans, engine.ranks[0], FakeRank(BLOCK_SIZE))
            server = engine.connect()
            good = generate(2, [1, 2, 3], 6)
            await server.send(generate(1, [13], 5), good)
            assert await server.read_until_end(2) == expected_completion(good)
            (event,) = server.events(1)
            assert event.finish is FinishReason.ERROR
            assert "could not take in this request: ZeroDivisionError" in (event.error or "")
            # its id is free again
            again = generate(1, [7], 3)
            await server.send(again)
            while len(server.events(1)) < 4:
                await server.read()
            assert engine.statistics().num_free_blocks == NUM_BLOCKS

    run(test)
    assert "unlucky" in caplog.text
    assert "Traceback" in caplog.text


def test_statistics_tell_the_sizes_of_steps() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            engine.nursery.start_soon(answer_plans, engine.ranks[0], FakeRank(BLOCK_SIZE))
            server = engine.connect()
            await server.send(generate(1, [1] * 9, 3))
            await server.read_until_end(1)
            await server.send(generate(2, [2] * 100, 1))
            await server.read_until_end(2)
            while (statistics := server.statistics()) is None or statistics.step_tokens_sum < 111:
                await server.read()
            # 9, 1 and 1 tokens, and 100
            by_bound = dict(zip((*STEP_TOKENS_BUCKETS, "more"), statistics.step_tokens, strict=True))
            assert {bound: number for bound, number in by_bound.items() if number} == {1: 2, 16: 1, 128: 1}
            assert sum(statistics.step_tokens) == statistics.num_steps == 4

    run(test)


def test_a_result_of_another_step_is_refused() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            await engine.connect().send(generate(1, [1], 5))
            await engine.ranks[0].receive_some()
            await engine.ranks[0].send_all(encode_frame(StepResult(step_id=5, token_ids=[])))
            await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        run(test)
    assert caught.group_contains(ValueError, match="step 0, not of step 5")
