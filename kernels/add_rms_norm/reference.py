"""The truth of `add_rms_norm`: an addition, then a norm. Any float dtype."""

from torch import Tensor

from llmd_kernels.rms_norm import reference as rms_norm_reference


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    new_residual = x + residual
    return rms_norm_reference.rms_norm(new_residual, weight, eps, weight_offset=weight_offset), new_residual
