"""The largest entries of each row, in an order without chance."""

from torch import Tensor

from llmd_kernels.top_tokens import torch_ops


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """logits [R, V], 0 ≤ k ≤ V → (values [R, k], ids [R, k] int64), largest first, of equal ones the lower id first.

    Only entries of -inf may come in any order. No NaN.
    """
    return torch_ops.top_tokens(logits, k)
