"""A client may leave at any point between plan and commit: its blocks are back at once, and the next plan has nothing
of it. The loop tells so when it comes to rest."""

import random
from functools import partial

import hypothesis.strategies as st
import pytest
import trio
import trio.testing
from hypothesis import given, settings

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.loop import EngineLoop
from llmd.engine.ranks import connect_ranks
from llmd.engine.scheduler import Scheduler
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.generation import EngineReady, EngineStatistics, EngineToServer, GenerateRequest, SamplingParams
from tests.engine.drive import VOCAB_SIZE, Drive, Key
from tests.fakes import FakeRank, serve_fake_rank

NUM_BLOCKS, BLOCK_SIZE = 12, 2


def random_request(draw: random.Random) -> GenerateRequest:
    return GenerateRequest(
        request_id=0,
        prompt_token_ids=[draw.randrange(VOCAB_SIZE) for _ in range(draw.choice([1, 2, 3, 8, 15]))],
        sampling=SamplingParams(max_tokens=draw.randint(1, 12), seed=0),
        priority=draw.randint(0, 2),
        client=draw.choice(["", "a"]),
    )


def blocks_held(drive: Drive) -> int:
    return drive.num_blocks - drive.statistics.num_free_blocks


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 1 << 32),
    num_moves=st.integers(0, 40),
    max_steps_in_flight=st.integers(1, 3),
    max_num_batched_tokens=st.sampled_from([1, 3, 16]),
    prefix_caching=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_cancelled_at_any_point(
    seed: int,
    num_moves: int,
    max_steps_in_flight: int,
    max_num_batched_tokens: int,
    prefix_caching: bool,
    policy: str,
) -> None:
    """n = 1 to 4 in a pool that is too small for two long requests; then all leave, one after the other."""
    draw = random.Random(seed)
    limits = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=max_num_batched_tokens,
        max_steps_in_flight=max_steps_in_flight,
        policy="fcfs" if policy == "fcfs" else "priority",
    )
    cache = CacheConfig(block_size=BLOCK_SIZE, prefix_caching=prefix_caching)
    drive = Drive(cache, limits, num_blocks=NUM_BLOCKS)
    for _ in range(num_moves):
        match draw.choice(["add", "plan", "plan", "commit", "commit", "cancel"]):
            case "add":
                request = random_request(draw)
                for _ in range(draw.randint(1, 4)):
                    drive.add(request)
            case "plan":
                drive.plan()
            case "commit" if drive.in_flight:
                drive.commit()
            case "cancel" if drive.open:
                drive.cancel(draw.choice(list(drive.open)))
    for key in draw.sample(list(drive.open), len(drive.open)):
        leave(drive, key)
    # whatever is still in flight
    assert blocks_held(drive) == 0
    while drive.in_flight:
        drive.commit()
        assert blocks_held(drive) == 0
    assert drive.scheduler.plan() is None
    assert drive.scheduler.is_idle


def leave(drive: Drive, key: Key) -> None:
    """The request goes; the ones that stay keep their blocks, and the next step is theirs alone."""
    before = drive.statistics
    drive.cancel(key)
    after = drive.statistics
    assert after.num_running + after.num_waiting == before.num_running + before.num_waiting - 1
    assert after.num_free_blocks >= before.num_free_blocks
    # the rank refuses a plan that runs a sequence which it was told to forget
    plan = drive.plan()
    if plan is not None:
        assert len(plan.sequence_ids) <= drive.statistics.num_running


@pytest.mark.parametrize("num_requests", [1, 3])
def test_the_loop_tells_its_figures_when_it_comes_to_rest(num_requests: int) -> None:
    """Also if the results came, and ended the last request, while the plan was still being sent."""

    async def main() -> None:
        engine_end, rank_end = trio.testing.memory_stream_pair()
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            serve_rank = partial(serve_fake_rank, num_blocks=NUM_BLOCKS, max_model_len=NUM_BLOCKS * BLOCK_SIZE)
            nursery.start_soon(serve_rank, rank_end, FakeRank(BLOCK_SIZE))
            ranks = await connect_ranks([engine_end])
            scheduler = Scheduler(
                CacheConfig(block_size=BLOCK_SIZE),
                SchedulerConfig(),
                num_blocks=ranks.num_blocks,
                max_model_len=ranks.max_model_len,
            )
            deliver = engine_end.send_stream.send_all_hook

            async def deliver_and_wait() -> None:
                """Sending takes longer than the step itself."""
                assert deliver is not None
                await deliver()
                await trio.testing.wait_all_tasks_blocked()

            engine_end.send_stream.send_all_hook = deliver_and_wait
            ready = EngineReady(max_model_len=24, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, vocab_size=VOCAB_SIZE)
            loop = EngineLoop(scheduler, ranks, ready=ready)
            nursery.start_soon(loop.run)
            nursery.start_soon(loop.serve, theirs)
            decoder: FrameDecoder[EngineToServer] = FrameDecoder(EngineToServer)
            for number in range(1, num_requests + 1):
                request = GenerateRequest(
                    request_id=number, prompt_token_ids=[1], sampling=SamplingParams(max_tokens=1, seed=0)
                )
                await ours.send_all(encode_frame(request))
                figures: EngineStatistics | None = None
                with trio.fail_after(20):
                    while figures is None or figures.num_output_tokens < number:
                        for message in decoder.feed(await ours.receive_some()):
                            if not isinstance(message, EngineReady):
                                figures = message.statistics or figures
            nursery.cancel_scope.cancel()

    trio.run(main)
