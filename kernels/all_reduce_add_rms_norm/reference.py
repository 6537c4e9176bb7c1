"""The truth of `all_reduce_add_rms_norm`: all ranks at once. Any float dtype."""

from torch import Tensor

from llmd_kernels.add_rms_norm.reference import add_rms_norm


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """x [R, T, H], the parts of all ranks, residual [T, H] → what each rank gets."""
    total = x[0]
    for part in x[1:]:
        total = total + part
    return add_rms_norm(total, residual, weight, eps, weight_offset=weight_offset)
