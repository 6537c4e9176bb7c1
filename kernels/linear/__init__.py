"""y = x · weightᵀ + bias."""

from torch import Tensor

from llmd_kernels.linear import torch_ops


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] or None → [T, N] in x's dtype; any T, also 0.

    A row of the result is bitwise the same whatever the other rows are and however many there are.
    """
    return torch_ops.linear(x, weight, bias)
