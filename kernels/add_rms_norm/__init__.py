"""Add to the residual stream and normalize the sum."""

from torch import Tensor

from llmd_kernels.add_rms_norm import torch_ops
from llmd_kernels.dispatch import uses_triton


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """x, residual [T, H], weight [H] → (normed [T, H], new_residual [T, H] = x + residual), both in x's dtype.

    The norm is that of `rms_norm`, taken of the new residual as it is returned. The inputs stay as they are.
    """
    if uses_triton(x, residual, weight):
        from llmd_kernels.add_rms_norm import triton_ops

        return triton_ops.add_rms_norm(x, residual, weight, eps, weight_offset=weight_offset)
    return torch_ops.add_rms_norm(x, residual, weight, eps, weight_offset=weight_offset)
