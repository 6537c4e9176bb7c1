"""One request as the scheduler sees it. Knows no queues and no block pool.

    add ──► waiting ──plan──► running ──commit──► finished
               ▲                 │
               └─────preempt─────┘                cancelled: gone at once, from either state

The tokens of a running sequence, in order (positions grow to the right):

    │ prompt                        │ output                          │
    │ computed           │ in flight, in order of the plans │ to run  │
                         ▲ num_computed                     ▲ num_planned
    │ token_ids (known)                        │ drawn by plans in flight │
                                               ▲ num_known                ▲ num_total
"""

from dataclasses import dataclass, field
from typing import NewType

import msgspec

from llmd.engine.prefix_cache import BlockHash
from llmd.protocol.generation import FinishReason, GenerateRequest, TokenLogprobs
from llmd.protocol.steps import NewSequence

# A server's connection to the engine: request ids are unique only within one.
ConnectionId = NewType("ConnectionId", int)


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A request and how far it is. The scheduler alone writes to it."""

    connection: ConnectionId
    request: GenerateRequest
    token_ids: list[int]  # prompt and output so far
    num_prompt_tokens: int
    max_output_tokens: int  # what the request and the context allow
    # (not alone, priority, fair round, arrival): the smaller is served first and preempted last; set when taken in
    order: tuple[bool, int, int, int] = (True, 0, 0, 0)

    # The state of one admission, set by `start`; while it waits it has no sequence id and no blocks.
    sequence_id: int | None = None  # by which the ranks know it
    block_ids: list[int] = field(default_factory=list)
    num_blocks_sent: int = 0  # of them, those that the ranks have been told of
    num_blocks_published: int = 0  # of them, those that stand in the prefix cache or came from there
    num_computed: int = 0  # tokens whose KV is in the cache, as committed
    num_planned: int = 0  # the same once the plans in flight have run
    num_samples_in_flight: int = 0  # tokens that the plans in flight will draw
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # collected until the first event

    # What holds from the first admission to the end.
    block_hashes: list[BlockHash] = field(default_factory=list)  # of full blocks of known tokens
    num_cached_tokens: int | None = None  # prompt tokens that the prefix cache held at the first admission
    num_to_compute: int = field(init=False)  # tokens that run if it ends by its length: all but the last
    has_reported: bool = False  # its first event is out
    must_be_alone: bool = False  # nobody may run beside it: asked for, and it has drawn nothing yet

    def __post_init__(self) -> None:
        # nothing is drawn from the last output token
        self.num_to_compute = self.num_prompt_tokens + max(self.max_output_tokens - 1, 0)

    @property
    def num_known(self) -> int:
        return len(self.token_ids)

    @property
    def num_total(self) -> int:
        """Tokens that exist once the plans in flight have run."""
        return len(self.token_ids) + self.num_samples_in_flight

    @property
    def num_to_run(self) -> int:
        """Tokens to catch up with."""
        # asked of each sequence at each step: `min` and another property would take longer than all else here
        num_total = len(self.token_ids) + self.num_samples_in_flight
        return (num_total if num_total < self.num_to_compute else self.num_to_compute) - self.num_planned

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the logits of the whole prompt are still needed: then none of it may come from the cache."""
        return self.request.sampling.num_prompt_logprobs is not None and not self.has_reported

    def finish_reason(self) -> FinishReason | None:
        """How the sequence has ended with the tokens that are known and computed, if it has."""
        sampling = self.request.sampling
        num_output_tokens = len(self.token_ids) - self.num_prompt_tokens
        # a stop token before min_tokens is text: the sampler masks it, so only a client can have put it there
        if num_output_tokens > sampling.min_tokens and self.token_ids[-1] in sampling.stop_token_ids:
            return FinishReason.STOP
        # without any output it is the whole prompt that must have been computed
        if num_output_tokens >= self.max_output_tokens and (
            num_output_tokens > 0 or self.num_computed == self.num_prompt_tokens
        ):
            return FinishReason.LENGTH
        return None

    def start(self, sequence_id: int, *, cached_ids: list[int], taken_ids: list[int], num_cached_tokens: int) -> None:
        """From waiting to running, with blocks that hold its first `num_cached_tokens` and with others."""
        self.sequence_id = sequence_id
        self.block_ids = cached_ids + taken_ids
        self.num_blocks_sent = 0
        self.num_blocks_published = len(cached_ids)
        self.num_computed = self.num_planned = num_cached_tokens
        self.num_samples_in_flight = 0
        self.prompt_logprobs = []

    def stop(self) -> list[int]:
        """No longer running; returns the blocks to give back."""
        block_ids, self.block_ids = self.block_ids, []
        self.sequence_id = None
        return block_ids

    def to_new_sequence(self, sequence_id: int) -> NewSequence:
        """What the ranks must know when it is admitted (again)."""
        sampling = self.request.sampling
        if self.has_reported and sampling.num_prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, num_prompt_logprobs=None)
        return NewSequence(
            sequence_id=sequence_id,
            token_ids=list(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            sampling=sampling,
        )
