"""How the token of each row is to be drawn, and what was drawn. Knows no request and no sequence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from llmd_kernels.token_logprobs.result import TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSampling:
    """How the tokens of one sequence are drawn: built once a sequence, used at each of its steps."""

    seed: int  # 0 ≤ seed < 2**64: the noise's key
    choice: int = 0  # 0 ≤ choice < 2**32: which of several answers to the same prompt
    temperature: float = 1.0  # 0 = the most likely token
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # 0 = off
    repetition_penalty: float = 1.0  # over prompt and output; 1 = off
    presence_penalty: float = 0.0  # over the output; 0 = off
    frequency_penalty: float = 0.0  # over the output; 0 = off
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id → added to its logit
    min_tokens: int = 0  # stop tokens cannot be drawn before this many output tokens
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None  # None = none; 0 = the drawn token's only; k = and the k most likely


@dataclass(frozen=True)
class SamplingBatch:
    """One entry a row of the logits. The token that a row draws comes after its `token_ids`.

    The token lists are read while `sample` runs and not kept: give the sequences' own lists, no copies.
    """

    sampling: Sequence[RowSampling]  # [R]
    token_ids: Sequence[Sequence[int]]  # [R]: prompt and output so far
    num_prompt_tokens: Sequence[int]  # [R]

    def __len__(self) -> int:
        return len(self.sampling)

    def position(self, row: int) -> int:
        """Which output token this row draws, from 0."""
        return len(self.token_ids[row]) - self.num_prompt_tokens[row]


@dataclass(frozen=True, slots=True)
class SampledTokens:
    token_ids: Tensor  # [R] int64
    logprobs: list[TokenLogprobs | None]  # [R]: of the raw distribution, for the rows that ask
