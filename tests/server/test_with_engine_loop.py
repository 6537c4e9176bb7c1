"""The server's side and the real engine loop together, with a fake rank: many requests at once, engines that die."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

import pytest
import trio
import trio.testing

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.loop import EngineLoop
from llmd.engine.ranks import connect_ranks
from llmd.engine.scheduler import Scheduler
from llmd.protocol.generation import EngineReady, FinishReason, GenerateRequest, SamplingParams, TokenEvent
from llmd.server.engine_client import EngineClient, SequenceStart
from tests.fakes import VOCAB_SIZE, FakeRank, expected_completion, serve_fake_rank, token_logprobs
from tests.server.fake_engine import run

NUM_BLOCKS, BLOCK_SIZE, MAX_MODEL_LEN = 24, 4, 64


@dataclass
class Engines:
    """One engine after another behind the same path."""

    client: EngineClient
    loop: EngineLoop | None = None
    scheduler: Scheduler | None = None
    nursery: trio.Nursery | None = None
    num_started: int = 0

    async def connect(self, path: str) -> trio.abc.Stream:
        if self.loop is None or self.nursery is None:
            raise ConnectionRefusedError(path)
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.loop.serve, theirs)
        return ours

    async def live(self) -> None:
        """Start engines for ever; `kill` ends one."""
        while True:
            await self._live_once()

    async def _live_once(self) -> None:
        async with trio.open_nursery() as nursery:
            engine_end, rank_end = trio.testing.memory_stream_pair()
            rank = FakeRank(BLOCK_SIZE, num_blocks=NUM_BLOCKS)
            serve_rank = partial(serve_fake_rank, num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN)
            nursery.start_soon(serve_rank, rank_end, rank)
            ranks = await connect_ranks([engine_end])
            self.scheduler = Scheduler(
                CacheConfig(block_size=BLOCK_SIZE),
                SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16),
                num_blocks=ranks.num_blocks,
                max_model_len=ranks.max_model_len,
            )
            ready = EngineReady(
                max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, vocab_size=264
            )
            self.loop, self.nursery = EngineLoop(self.scheduler, ranks, ready=ready), nursery
            self.num_started += 1
            nursery.start_soon(self.loop.run)
        self.loop = self.nursery = None

    def kill(self) -> None:
        assert self.nursery is not None
        self.nursery.cancel_scope.cancel()


@asynccontextmanager
async def engines() -> AsyncIterator[Engines]:
    made: list[Engines] = []
    client = EngineClient("engine.sock", connect=lambda path: made[0].connect(path))
    made.append(Engines(client))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made[0].live)
        nursery.start_soon(client.run)
        yield made[0]
        nursery.cancel_scope.cancel()


def starts(number: int) -> list[SequenceStart]:
    """Two sequences of the same prompt, of many lengths; log-probabilities for some."""
    num_logprobs = 0 if number % 3 == 0 else None
    sampling = SamplingParams(
        max_tokens=5 + number % 20,
        seed=number,
        stop_token_ids=(number % VOCAB_SIZE, 17),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_logprobs,
    )
    prompt = [(number * 7 + i) % VOCAB_SIZE for i in range(1 + number % 11)]
    return [SequenceStart(prompt, sampling), SequenceStart(prompt, sampling)]


def check(start: SequenceStart, events: list[TokenEvent]) -> None:
    """The client has heard exactly what an undisturbed engine says."""
    token_ids = [token_id for event in events for token_id in event.token_ids]
    request = GenerateRequest(request_id=0, prompt_token_ids=start.prompt_token_ids, sampling=start.sampling)
    assert (token_ids, events[-1].finish) == expected_completion(request, max_model_len=MAX_MODEL_LEN)
    assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
    assert sum(event.num_cached_tokens is not None for event in events) == 1
    if start.sampling.num_logprobs is None:
        return
    context = [*start.prompt_token_ids, *token_ids]
    num_prompt_tokens = len(start.prompt_token_ids)
    drawn = [logprobs for event in events for logprobs in event.logprobs]
    expected = [token_logprobs(context[:i], context[i]) for i in range(num_prompt_tokens, len(context))]
    assert [(each.token_id, each.logprob) for each in drawn] == [(each.token_id, each.logprob) for each in expected]
    (of_prompt,) = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
    assert [each.token_id for each in of_prompt] == start.prompt_token_ids[1:]


@pytest.mark.parametrize("num_deaths", [0, 1, 4])
def test_every_sequence_ends_once_with_what_an_undisturbed_engine_says(num_deaths: int) -> None:
    async def main() -> None:
        async with engines() as engine:
            num_events = 0
            ended: Counter[FinishReason | None] = Counter()

            async def ask(number: int) -> None:
                nonlocal num_events
                asked = starts(number)
                heard: list[list[TokenEvent]] = [[], []]
                with engine.client.generate(asked) as generation:
                    while not all(events and events[-1].finish for events in heard):
                        for index, event in await generation.take():
                            heard[index].append(event)
                            num_events += 1
                            # deaths are spread over the whole run
                            if engine.num_started <= num_deaths and num_events >= 25 * engine.num_started:
                                engine.kill()
                for start, events in zip(asked, heard, strict=True):
                    check(start, events)
                    ended[events[-1].finish] += 1

            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(ask, number)
            assert ended.total() == 40
            assert engine.num_started == num_deaths + 1
            assert engine.client.num_open == 0
            assert engine.client.backlog.num_sequences == engine.client.backlog.num_tokens == 0
            assert ended[FinishReason.LENGTH] > 0

    run(main)


def test_a_deadline_frees_every_block_though_nobody_takes_the_events() -> None:
    async def main() -> None:
        async with engines() as engine:
            await engine.client.wait_ready()
            deadline = trio.current_time()
            late = [replace(start, deadline=deadline) for number in range(8) for start in starts(number)]
            with engine.client.generate(late):
                while engine.client.num_open:
                    await trio.lowlevel.checkpoint()
                scheduler = engine.scheduler
                assert scheduler is not None
                while scheduler.statistics().num_running + scheduler.statistics().num_waiting:
                    await trio.lowlevel.checkpoint()
                assert scheduler.statistics().num_free_blocks == NUM_BLOCKS
                assert scheduler.statistics().num_output_tokens < sum(start.sampling.max_tokens for start in late)

    run(main)


def test_leaving_frees_every_block() -> None:
    async def main() -> None:
        async with engines() as engine:
            await engine.client.wait_ready()
            for number in range(8):
                with engine.client.generate(starts(number)) as generation:
                    await generation.take()
            assert engine.client.num_open == 0
            scheduler = engine.scheduler
            assert scheduler is not None
            while scheduler.statistics().num_running + scheduler.statistics().num_waiting:
                await trio.lowlevel.checkpoint()
            assert scheduler.statistics().num_free_blocks == NUM_BLOCKS

    run(main)
