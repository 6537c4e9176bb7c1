"""Real engine loops behind one path, one after another, each with a fake rank; and servers' clients of them."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio
import trio.testing

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.loop import EngineLoop
from llmd.engine.ranks import RankLost, connect_ranks
from llmd.engine.scheduler import Scheduler
from llmd.protocol.generation import EngineReady, GenerateRequest, TokenEvent
from llmd.server.engine_client import EngineClient, SequenceStart
from tests.fakes import FatalRank, expected_completion, serve_fake_rank, token_logprobs

NUM_BLOCKS, BLOCK_SIZE, MAX_MODEL_LEN = 24, 4, 64
NARROW = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16)


class Engines:
    """One engine after another. `client` is the first of `num_clients` servers' clients."""

    def __init__(
        self, *, is_fatal: Callable[[list[int]], bool], num_clients: int, num_blocks: int, limits: SchedulerConfig
    ) -> None:
        self.clients = [EngineClient("engine.sock", connect=self.connect) for _ in range(num_clients)]
        self.client = self.clients[0]
        self.scheduler: Scheduler | None = None
        self.num_started = 0
        self.num_rank_deaths = 0
        self.num_still_births = 0  # connections to come that end before the engine is ready
        self._is_fatal = is_fatal
        self._num_blocks = num_blocks
        self._limits = limits
        self._loop: EngineLoop | None = None
        self._nursery: trio.Nursery | None = None

    async def connect(self, path: str) -> trio.abc.Stream:
        if self._loop is None or self._nursery is None:
            raise ConnectionRefusedError(path)
        ours, theirs = trio.testing.memory_stream_pair()
        if self.num_still_births:
            self.num_still_births -= 1
            await theirs.aclose()
        else:
            self._nursery.start_soon(self._loop.serve, theirs)
        return ours

    async def live(self) -> None:
        """Start engines for ever; `kill` ends one, and so does its rank's death."""
        while True:
            try:
                await self._live_once()
            except* RankLost:
                self.num_rank_deaths += 1
            finally:
                self._loop = self._nursery = None

    async def _live_once(self) -> None:
        async with trio.open_nursery() as nursery:
            engine_end, rank_end = trio.testing.memory_stream_pair()
            rank = FatalRank(BLOCK_SIZE, is_fatal=self._is_fatal, num_blocks=self._num_blocks)
            serve_rank = partial(serve_fake_rank, num_blocks=self._num_blocks, max_model_len=MAX_MODEL_LEN)
            nursery.start_soon(serve_rank, rank_end, rank)
            ranks = await connect_ranks([engine_end])
            self.scheduler = Scheduler(
                CacheConfig(block_size=BLOCK_SIZE),
                self._limits,
                num_blocks=ranks.num_blocks,
                max_model_len=ranks.max_model_len,
            )
            ready = EngineReady(
                max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, num_blocks=ranks.num_blocks, vocab_size=264
            )
            self._loop, self._nursery = EngineLoop(self.scheduler, ranks, ready=ready), nursery
            self.num_started += 1
            nursery.start_soon(self._loop.run)

    def kill(self) -> None:
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()


@asynccontextmanager
async def engines(
    *,
    is_fatal: Callable[[list[int]], bool] = lambda _: False,
    num_clients: int = 1,
    num_blocks: int = NUM_BLOCKS,
    limits: SchedulerConfig = NARROW,
) -> AsyncIterator[Engines]:
    """Engines, and clients that run. On leaving, no client may have anything open or waiting."""
    made = Engines(is_fatal=is_fatal, num_clients=num_clients, num_blocks=num_blocks, limits=limits)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.live)
        for client in made.clients:
            nursery.start_soon(client.run)
        yield made
        for client in made.clients:
            assert client.num_open == client.backlog.num_sequences == client.backlog.num_tokens == 0
        nursery.cancel_scope.cancel()


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
