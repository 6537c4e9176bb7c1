"""Messages between a server and an engine. One request here is one sequence: `n` and lists of prompts are fanned out
by the server, which owns the state of every open request (contract C1)."""

from enum import StrEnum

from msgspec import Struct

# tokens a step may run, as the upper bounds of the buckets of `EngineStatistics.step_tokens`; beyond them is one more
STEP_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class FinishReason(StrEnum):
    STOP = "stop"  # a stop token, which is the event's last token
    LENGTH = "length"  # max_tokens, or the context is full
    ERROR = "error"  # see TokenEvent.error


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn: resolved, so that nothing is left to default further down.

    The token at output position i depends on (logits, these parameters, i) alone (contract C2).
    """

    max_tokens: int  # output tokens, ≥ 0; 0 = only compute the prompt
    seed: int  # 0 ≤ seed < 2**63; drawn by the server where the client gave none
    choice: int = 0  # which of the n answers to the same prompt; part of the noise's key
    min_tokens: int = 0  # stop tokens are masked before this many output tokens
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # 0 = off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}  # token id → added to its logit
    stop_token_ids: tuple[int, ...] = ()  # end-of-sequence tokens included, unless they are to be ignored
    num_logprobs: int | None = None  # None = none; 0 = the drawn token's only; k = and the k most likely
    num_prompt_logprobs: int | None = None  # the same for every prompt token


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, of the model's raw distribution."""

    token_id: int
    logprob: float
    rank: int  # 1 = the most likely
    top_ids: list[int]  # most likely first
    top_logprobs: list[float]


class GenerateRequest(Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    request_id: int  # unique within one server's connection
    prompt_token_ids: list[int]  # at least one
    sampling: SamplingParams
    output_token_ids: list[int] = []  # already given to the client: go on after these (contract C1)
    priority: int = 0  # lower is earlier
    cache_salt: str = ""  # prefixes are shared only between equal salts
    client: str = ""  # who asks: waiting requests of equal priority are shared out fairly between clients
    alone: bool = False  # it may be what kills engines: nobody runs beside it until it has drawn a token


class CancelRequest(Struct, frozen=True, tag=True):
    request_id: int


class TokenEvent(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What a client must hear of one sequence. After an event with `finish` there is none."""

    request_id: int
    token_ids: list[int] = []  # new ones, in order
    logprobs: list[TokenLogprobs] = []  # one a token, if asked
    prompt_logprobs: list[TokenLogprobs] | None = None  # on the first event, if asked: prompt tokens 1, 2, …
    num_cached_tokens: int | None = None  # on the first event: prompt tokens that the prefix cache held
    finish: FinishReason | None = None
    error: str | None = None  # with FinishReason.ERROR: what to tell the client


class EngineStatistics(Struct, frozen=True, kw_only=True):
    """The engine's state and counters since its start."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int  # cached blocks that nobody holds count as free
    num_steps: int
    num_prompt_tokens: int  # computed, not cached
    num_output_tokens: int
    num_preemptions: int
    prefix_cache_queries: int  # tokens looked up
    prefix_cache_hits: int  # tokens found
    step_tokens: list[int]  # steps by the tokens they ran: one count for each of STEP_TOKENS_BUCKETS, and the rest
    step_tokens_sum: int  # tokens run by all steps


class EngineReady(Struct, frozen=True, kw_only=True, tag=True):
    """First message to every server that connects, once the ranks have loaded."""

    max_model_len: int  # tokens of prompt and answer that fit
    block_size: int
    num_blocks: int
    vocab_size: int  # the model knows token ids below this; a tokenizer may have more, or fewer


class StepEvents(Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """One frame a step for all requests of a connection. Often it is one token for each: so they stand in columns."""

    started: list[int] = []  # request ids that begin to run (again); told before the ranks get the step
    events: list[TokenEvent] = []
    tokens: dict[int, int] = {}  # request id → the token that is all that it must hear, after `events`
    statistics: EngineStatistics | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + sum([len(event.token_ids) for event in self.events])

    def all_events(self) -> list[TokenEvent]:
        """`events`, and one for each of `tokens`."""
        return self.events + [TokenEvent(request_id=id_, token_ids=[token]) for id_, token in self.tokens.items()]


ServerToEngine = GenerateRequest | CancelRequest
EngineToServer = EngineReady | StepEvents
