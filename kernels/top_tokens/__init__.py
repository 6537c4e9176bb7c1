"""The largest entries of each row, in an order without chance."""

from torch import Tensor

from llmd_kernels.dispatch import uses_triton
from llmd_kernels.top_tokens import torch_ops


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """logits [R, V], 0 ≤ k ≤ V → (values [R, k], ids [R, k] int64), largest first, of equal ones the lower id first.

    Only entries of -inf may come in any order. No NaN. On a GPU nothing is read back.
    """
    if uses_triton(logits):
        from llmd_kernels.top_tokens import triton_ops

        return triton_ops.top_tokens(logits, k)
    return torch_ops.top_tokens(logits, k)
