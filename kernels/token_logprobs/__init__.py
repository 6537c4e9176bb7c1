"""Log-probabilities of given tokens, their ranks and the most likely tokens beside them."""

from torch import Tensor

from llmd_kernels.token_logprobs import torch_ops
from llmd_kernels.token_logprobs.result import TokenLogprobs

__all__ = ["TokenLogprobs", "token_logprobs"]


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> list[TokenLogprobs]:
    """logits [R, V] float, token_ids [R] int64, 0 ≤ num_top ≤ V → one TokenLogprobs a row.

    Natural logarithms of the softmax of the logits as they are (no temperature, no filter).
    """
    return torch_ops.token_logprobs(logits, token_ids, num_top)
