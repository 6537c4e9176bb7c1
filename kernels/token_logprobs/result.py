"""What is said of one token's probability. Data only."""

from typing import NamedTuple

from torch import Tensor


class TokenLogprobs(NamedTuple):
    """One token under one row's raw distribution."""

    token_id: int
    logprob: float  # natural logarithm
    rank: int  # 1 = the most likely; of equal logits the lower id comes first
    top_ids: list[int]  # most likely first
    top_logprobs: list[float]


class DeviceLogprobs(NamedTuple):
    """The same of R tokens, each under its own row, as tensors on the device; K most likely tokens a row."""

    token_ids: Tensor  # [R] int64
    logprobs: Tensor  # [R] float32
    ranks: Tensor  # [R] int32
    top_ids: Tensor  # [R, K] int64
    top_logprobs: Tensor  # [R, K] float32

    def on_host(self) -> list[TokenLogprobs]:
        """Waits for the device."""
        return [TokenLogprobs(*row) for row in zip(*(column.tolist() for column in self), strict=True)]
