"""The server's side and the real engine loop together, with a fake rank: many requests at once, engines that die."""

from collections import Counter
from dataclasses import replace

import pytest
import trio

from llmd.protocol.generation import FinishReason, SamplingParams, TokenEvent
from llmd.server.engine_client import SequenceStart
from tests.fakes import VOCAB_SIZE
from tests.server.engines import NUM_BLOCKS, check, engines
from tests.server.fake_engine import run


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
