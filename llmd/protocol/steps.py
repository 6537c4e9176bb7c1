"""Messages between an engine and its workers: what one step must do, and what came of it.

Every rank keeps a copy of each live sequence (tokens, sampling parameters, block table), so a plan carries only
differences. Workers run plans strictly in the order in which they come; that is what makes it safe to hand out a
block again while the step that used it last is still in flight, and to plan the next step before this one's tokens
are known: the rank that runs it knows them by then.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from msgspec import Struct

from llmd.protocol.generation import SamplingParams, TokenLogprobs


class NewSequence(Struct, frozen=True, kw_only=True):
    """A sequence that the ranks do not know, or know no longer (preempted, resumed)."""

    sequence_id: int  # unique within the engine, never used twice
    token_ids: list[int]  # prompt and output so far
    num_prompt_tokens: int
    sampling: SamplingParams


class SequenceStep(NamedTuple):
    """Tokens [start, start + num_tokens) of one sequence run in a step."""

    sequence_id: int
    start: int
    num_tokens: int
    new_block_ids: Sequence[int]
    samples: bool


class StepPlan(Struct, frozen=True, kw_only=True, tag=True):
    """What one step must do. Rows stand in columns: a step has hundreds, and no time for an object each."""

    step_id: int
    dropped: list[int] = []  # sequence ids to forget, before `new` is taken in
    new: list[NewSequence] = []
    new_block_ids: dict[int, list[int]] = {}  # sequence id → to append to its block table before the step, if any
    # one entry a row; no sequence has two
    sequence_ids: list[int]
    starts: list[int]  # tokens whose KV is in the cache by then
    num_tokens: list[int]  # ≥ 1
    samples: list[bool]  # draw the next token from the last one's logits, and append it to the sequence

    def rows(self) -> Iterator[SequenceStep]:
        """The rows one by one, for those who have the time."""
        new_block_ids = [self.new_block_ids.get(sequence_id, ()) for sequence_id in self.sequence_ids]
        columns = self.sequence_ids, self.starts, self.num_tokens, new_block_ids, self.samples
        return map(SequenceStep._make, zip(*columns, strict=True))


class StepResult(Struct, frozen=True, kw_only=True, tag=True):
    """What a step made of its rows."""

    step_id: int
    token_ids: list[int]  # the drawn tokens: one a row that samples, in the plan's order
    # by sequence id, of those who asked
    logprobs: dict[int, TokenLogprobs] = {}  # of the drawn token
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}  # of the prompt tokens that follow the tokens run


class RankReady(Struct, frozen=True, kw_only=True, tag=True):
    """First message of a worker: its weights are loaded and its KV cache stands."""

    rank: int
    num_blocks: int  # KV-cache blocks that fit
    max_model_len: int  # context that the model and this memory allow
    vocab_size: int  # rows of the embedding: token ids below this


class RankFailed(Struct, frozen=True, tag=True):
    """The rank cannot go on; its process ends after this."""

    message: str


EngineToWorker = StepPlan
WorkerToEngine = RankReady | StepResult | RankFailed
