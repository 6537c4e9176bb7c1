"""Stand-ins that behave: no mocks. A rank whose "KV cache" is a dict of tokens, and what it must answer."""

import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.generation import FinishReason, GenerateRequest, TokenLogprobs
from llmd.protocol.steps import NewSequence, RankReady, SequenceStep, StepPlan, StepResult

VOCAB_SIZE = 251


def next_token(context: Sequence[int], vocab_size: int = VOCAB_SIZE) -> int:
    """The fake model: the next token depends on every token before it, and on their order."""
    return zlib.crc32(array("q", context).tobytes()) % vocab_size


def token_logprobs(context: Sequence[int], token_id: int) -> TokenLogprobs:
    """The fake model's opinion of `token_id` after `context`: a number that no other context is likely to give."""
    logprob = -next_token([*context, token_id], 1 << 20) / (1 << 16)
    return TokenLogprobs(token_id=token_id, logprob=logprob, rank=1, top_ids=[token_id], top_logprobs=[logprob])


class Completion(NamedTuple):
    token_ids: list[int]  # new ones, after the request's `output_token_ids`
    finish: FinishReason


def expected_completion(
    request: GenerateRequest, *, max_model_len: int = 1 << 30, vocab_size: int = VOCAB_SIZE
) -> Completion:
    """What the fake model answers to a request that it has for itself, worked out without any scheduler."""
    tokens = [*request.prompt_token_ids, *request.output_token_ids]
    num_known, num_prompt = len(tokens), len(request.prompt_token_ids)
    sampling = request.sampling
    while True:
        num_output = len(tokens) - num_prompt
        if num_output > sampling.min_tokens and tokens[-1] in sampling.stop_token_ids:
            return Completion(tokens[num_known:], FinishReason.STOP)
        if num_output >= sampling.max_tokens or len(tokens) >= max_model_len:
            return Completion(tokens[num_known:], FinishReason.LENGTH)
        tokens.append(next_token(tokens, vocab_size))


@dataclass(slots=True)
class _Copy:
    """What a rank knows of one live sequence."""

    new: NewSequence
    token_ids: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)  # what must stand in the cache for each token
    block_ids: list[int] = field(default_factory=list)

    def append(self, token_id: int) -> None:
        # depends on every token up to this one, as real K and V do
        before = self.entries[-1] if self.entries else 0
        self.entries.append(zlib.crc32(array("q", [before, token_id]).tobytes()))
        self.token_ids.append(token_id)


class FakeRank:
    """Runs steps as a worker does, and raises ValueError if a plan makes no sense.

    Its cache is a dict. It reads the context back through the block table and refuses to go on with one that is not the
    sequence's own, so that no wrong block, lost token or stale `start` can pass. As on a device all rows of a step run
    at once: no sequence can rely on what another one of the same step computes.
    """

    def __init__(self, block_size: int, *, num_blocks: int | None = None, vocab_size: int = VOCAB_SIZE) -> None:
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        self._cache: dict[tuple[int, int], int] = {}  # entries by (block id, offset)
        self._copies: dict[int, _Copy] = {}  # live sequences, by id
        self._seen_ids: set[int] = set()
        self.num_steps = 0
        self.num_tokens = 0  # rows run

    @property
    def num_sequences(self) -> int:
        """Sequences that it has not been told to forget."""
        return len(self._copies)

    def execute(self, plan: StepPlan) -> StepResult:
        for sequence_id in plan.dropped:
            del self._copies[sequence_id]
        for new in plan.new:
            self._take_in(new)
        rows = list(plan.rows())
        if len({step.sequence_id for step in rows}) != len(rows):
            raise ValueError(f"step {plan.step_id} runs a sequence twice")
        if not plan.new_block_ids.keys() <= set(plan.sequence_ids):
            raise ValueError(f"step {plan.step_id} has blocks for sequences that do not run")
        for step in rows:
            self._prepare(step)
        # everything is read before anything is written, and read again after everything is written
        for step in rows:
            self._check_context(step, step.start)
        for step in rows:
            copy = self._copies[step.sequence_id]
            for position in range(step.start, step.start + step.num_tokens):
                self._cache[self._slot(copy, position)] = copy.entries[position]
        result = StepResult(step_id=plan.step_id, token_ids=[], logprobs={}, prompt_logprobs={})
        for step in rows:
            self._answer(step, result)
        self.num_steps += 1
        return result

    def _take_in(self, new: NewSequence) -> None:
        if new.sequence_id in self._seen_ids:
            raise ValueError(f"sequence id {new.sequence_id} is used twice")
        self._seen_ids.add(new.sequence_id)
        copy = self._copies[new.sequence_id] = _Copy(new)
        for token_id in new.token_ids:
            copy.append(token_id)

    def _prepare(self, step: SequenceStep) -> None:
        copy = self._copies[step.sequence_id]
        copy.block_ids += step.new_block_ids
        end = step.start + step.num_tokens
        if step.num_tokens < 1 or end > len(copy.token_ids):
            raise ValueError(f"{step} does not lie in {len(copy.token_ids)} tokens")
        if end > len(copy.block_ids) * self._block_size:
            raise ValueError(f"{step} does not fit into {len(copy.block_ids)} blocks")
        if step.samples and end != len(copy.token_ids):
            raise ValueError(f"{step} draws a token in the middle of {len(copy.token_ids)} tokens")
        if self._num_blocks is not None and not all(0 <= block_id < self._num_blocks for block_id in copy.block_ids):
            raise ValueError(f"{step} uses a block that does not exist")

    def _answer(self, step: SequenceStep, result: StepResult) -> None:
        """Draw, and say so in `result`."""
        copy = self._copies[step.sequence_id]
        end = step.start + step.num_tokens
        self._check_context(step, end)
        context = copy.token_ids[:end]
        self.num_tokens += step.num_tokens
        if copy.new.sampling.num_prompt_logprobs is not None:
            followers = range(step.start + 1, min(end + 1, copy.new.num_prompt_tokens))
            if prompt_logprobs := [token_logprobs(context[:i], copy.token_ids[i]) for i in followers]:
                result.prompt_logprobs[step.sequence_id] = prompt_logprobs
        if step.samples:
            token_id = next_token(context, self._vocab_size)
            copy.append(token_id)
            result.token_ids.append(token_id)
            if copy.new.sampling.num_logprobs is not None:
                result.logprobs[step.sequence_id] = token_logprobs(context, token_id)

    def _check_context(self, step: SequenceStep, end: int) -> None:
        """Whether the sequence's first `end` tokens stand in the cache where its block table says."""
        copy = self._copies[step.sequence_id]
        for position in range(end):
            if self._cache.get(self._slot(copy, position)) != copy.entries[position]:
                raise ValueError(f"{step} reads another context than its own at position {position}")

    def _slot(self, copy: _Copy, position: int) -> tuple[int, int]:
        return copy.block_ids[position // self._block_size], position % self._block_size


class RankDied(Exception):
    """The process of a `FatalRank` is gone in the middle of a step."""


class FatalRank(FakeRank):
    """Dies of some rows, as a worker does of a bug in a kernel: those for whose context, the last token run included,
    `is_fatal` holds."""

    def __init__(
        self, block_size: int, *, is_fatal: Callable[[list[int]], bool], num_blocks: int | None = None
    ) -> None:
        super().__init__(block_size, num_blocks=num_blocks)
        self._is_fatal = is_fatal

    def _answer(self, step: SequenceStep, result: StepResult) -> None:
        if self._is_fatal(self._copies[step.sequence_id].token_ids[: step.start + step.num_tokens]):
            raise RankDied
        super()._answer(step, result)


async def serve_fake_rank(
    stream: trio.abc.Stream, rank: FakeRank, *, num_blocks: int, max_model_len: int, index: int = 0
) -> None:
    """Be a rank's process on `stream`, until the engine closes it or the rank dies."""
    decoder: FrameDecoder[StepPlan] = FrameDecoder(StepPlan)
    async with stream:
        await stream.send_all(
            encode_frame(
                RankReady(rank=index, num_blocks=num_blocks, max_model_len=max_model_len, vocab_size=VOCAB_SIZE)
            )
        )
        async for data in stream:
            for plan in decoder.feed(data):
                try:
                    result = rank.execute(plan)
                except RankDied:
                    return
                await stream.send_all(encode_frame(result))
