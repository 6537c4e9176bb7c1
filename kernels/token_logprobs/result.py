"""What is said of one token's probability. Data only."""

from typing import NamedTuple


class TokenLogprobs(NamedTuple):
    """One token under one row's raw distribution."""

    token_id: int
    logprob: float  # natural logarithm
    rank: int  # 1 = the most likely; of equal logits the lower id comes first
    top_ids: list[int]  # most likely first
    top_logprobs: list[float]
