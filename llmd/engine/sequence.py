"""One request as the scheduler sees it. Knows no queues and no block pool.

    add ──► waiting ──plan──► running ──commit──► finished
               ▲                 │
               └─────preempt─────┘                cancelled: gone at once, from either state

The tokens of a running sequence, in order (positions grow to the right):

    │ prompt                        │ output                          │
    │ computed           │ in flight, in order of the plans │ to run  │
                                                            ▲ num_planned
    │ token_ids (known)                        │ drawn by plans in flight │
                                               ▲ num_known                ▲ num_total
"""

from dataclasses import dataclass, field
from typing import NewType

import msgspec

from llmd.engine.prefix_cache import BlockHash
from llmd.protocol.generation import FinishReason, GenerateRequest, TokenEvent, TokenLogprobs
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
    num_blocks_published: int = 0  # of them, those that stand in the prefix cache or came from there
    num_planned: int = 0  # tokens whose KV is in the cache once the plans in flight have run
    # Most rows do what the last one did: nobody need look closer at one that starts before these. Its planning runs one
    # token and draws one, in a block that is there; its commit, unless it drew a stop token, neither ends the sequence
    # nor fills a block, and the token is all there is to tell. 0: look closer.
    plan_check_at: int = 0
    commit_check_at: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # collected until the first event

    # What holds from the first admission to the end.
    block_hashes: list[BlockHash] = field(default_factory=list)  # of full blocks of known tokens
    num_cached_tokens: int | None = None  # prompt tokens that the prefix cache held at the first admission
    request_id: int = field(init=False)
    stop_token_ids: tuple[int, ...] = field(init=False)
    wants_logprobs: bool = field(init=False)  # of what is drawn
    num_to_compute: int = field(init=False)  # tokens that run if it ends by its length: all but the last
    has_reported: bool = False  # its first event is out
    must_be_alone: bool = False  # nobody may run beside it: asked for, and it has drawn nothing yet

    def __post_init__(self) -> None:
        self.request_id = self.request.request_id
        self.stop_token_ids = self.request.sampling.stop_token_ids
        self.wants_logprobs = self.request.sampling.num_logprobs is not None
        # nothing is drawn from the last output token
        self.num_to_compute = self.num_prompt_tokens + max(self.max_output_tokens - 1, 0)

    @property
    def running_id(self) -> int:
        """The sequence id of one that runs."""
        assert self.sequence_id is not None
        return self.sequence_id

    @property
    def num_known(self) -> int:
        return len(self.token_ids)

    @property
    def num_to_run(self) -> int:
        """Tokens to catch up with."""
        # a plan that runs all there are draws one more
        num_total = max(len(self.token_ids), self.num_planned + 1)
        return min(num_total, self.num_to_compute) - self.num_planned

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the logits of the whole prompt are still needed: then none of it may come from the cache."""
        return self.request.sampling.num_prompt_logprobs is not None and not self.has_reported

    def finish_reason(self, *, num_computed: int = 0) -> FinishReason | None:
        """How the sequence has ended with the tokens that are known and with those computed, if it has."""
        num_output_tokens = len(self.token_ids) - self.num_prompt_tokens
        # a stop token before min_tokens is text: the sampler masks it, so only a client can have put it there
        if num_output_tokens > self.request.sampling.min_tokens and self.token_ids[-1] in self.stop_token_ids:
            return FinishReason.STOP
        # without any output it is the whole prompt that must have been computed
        if num_output_tokens >= self.max_output_tokens and (
            num_output_tokens > 0 or num_computed == self.num_prompt_tokens
        ):
            return FinishReason.LENGTH
        return None

    def start(self, sequence_id: int, *, cached_ids: list[int], taken_ids: list[int], num_cached_tokens: int) -> None:
        """From waiting to running, with blocks that hold its first `num_cached_tokens` and with others."""
        self.sequence_id = sequence_id
        self.block_ids = cached_ids + taken_ids
        self.num_blocks_published = len(cached_ids)
        self.num_planned = num_cached_tokens
        self.prompt_logprobs = []

    def stop(self) -> list[int]:
        """No longer running; returns the blocks to give back."""
        block_ids, self.block_ids = self.block_ids, []
        self.sequence_id = None
        self.plan_check_at = self.commit_check_at = 0
        return block_ids

    def report(self, token_ids: list[int], logprobs: list[TokenLogprobs], finish: FinishReason | None) -> TokenEvent:
        """What its client must hear of these."""
        if self.has_reported:
            return TokenEvent(request_id=self.request_id, token_ids=token_ids, logprobs=logprobs, finish=finish)
        event = TokenEvent(
            request_id=self.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs if self.wants_prompt_logprobs else None,
            num_cached_tokens=self.num_cached_tokens,
            finish=finish,
        )
        self.has_reported = True
        return event

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
