"""Messages between an engine and its workers: what one step must do, and what came of it.

Every rank keeps a copy of each live sequence (tokens, sampling parameters, block table), so a plan carries only
differences. Workers run plans strictly in the order in which they come; that is what makes it safe to hand out a
block again while the step that used it last is still in flight, and to plan the next step before this one's tokens
are known: the rank that runs it knows them by then.
"""

from msgspec import Struct

from llmd.protocol.generation import SamplingParams, TokenLogprobs


class NewSequence(Struct, frozen=True, kw_only=True):
    """A sequence that the ranks do not know, or know no longer (preempted, resumed)."""

    sequence_id: int  # unique within the engine, never used twice
    token_ids: list[int]  # prompt and output so far
    num_prompt_tokens: int
    sampling: SamplingParams


# Hundreds of these come and go each step: no cycle can go through them, so the garbage collector need not look at them.
class SequenceStep(Struct, frozen=True, array_like=True, gc=False):
    """Tokens [start, start + num_tokens) of one sequence run in this step."""

    sequence_id: int
    start: int  # tokens whose KV is in the cache by then
    num_tokens: int  # ≥ 1
    new_block_ids: tuple[int, ...]  # to append to the sequence's block table before the step
    samples: bool  # draw the next token from the last one's logits, and append it to the sequence


class StepPlan(Struct, frozen=True, kw_only=True, tag=True):
    step_id: int
    dropped: list[int]  # sequence ids to forget, before `new` is taken in
    new: list[NewSequence]
    sequences: list[SequenceStep]


class SequenceResult(Struct, frozen=True, array_like=True, gc=False):
    """What a step made of one sequence that samples or wants prompt logprobs."""

    sequence_id: int
    token_id: int | None  # the drawn token, if the step samples
    logprobs: TokenLogprobs | None = None  # of the drawn token, if asked
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt tokens that follow the tokens run, if asked


class StepResult(Struct, frozen=True, kw_only=True, tag=True):
    step_id: int
    results: list[SequenceResult]


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
