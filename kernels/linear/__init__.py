"""y = x · weightᵀ + bias."""

from torch import Tensor

from llmd_kernels.dispatch import uses_triton
from llmd_kernels.linear import torch_ops
from llmd_kernels.quantized_linear import QuantizedWeight, quantized_linear


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K] plain, packed or quantised, bias [N] or None → [T, N] in x's dtype; any T, also 0.

    A row of the result is bitwise the same whatever the other rows are and however many there are.
    """
    if not isinstance(weight, Tensor):
        return quantized_linear(x, weight, bias)
    # What was packed for a CPU has no rows to point at.
    if uses_triton(x, weight) and not weight.is_mkldnn:
        from llmd_kernels.linear import triton_ops

        return triton_ops.linear(x, weight, bias)
    return torch_ops.linear(x, weight, bias)


def pack_weight(weight: Tensor) -> Tensor:
    """weight [N, K] → the same numbers as `linear` reads them fastest on its device; where that is as they are, itself.

    A packed weight is a copy of the plain one's size, for `linear` only.
    """
    return torch_ops.pack_weight(weight)
