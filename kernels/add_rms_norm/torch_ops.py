"""`add_rms_norm` with PyTorch operators."""

from torch import Tensor

from llmd_kernels.rms_norm import rms_norm


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Two operations: nothing to fuse with PyTorch's operators."""
    new_residual = x + residual
    return rms_norm(new_residual, weight, eps, weight_offset=weight_offset), new_residual
