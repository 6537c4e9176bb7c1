"""Root mean square normalization of each row."""

from torch import Tensor

from llmd_kernels.dispatch import uses_triton
from llmd_kernels.rms_norm import torch_ops


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0) -> Tensor:
    """x [..., H], weight [H] → [..., H] in x's dtype: x / sqrt(mean(x²) + eps) · (weight + weight_offset).

    Computed in float32 at least. Gemma stores its weights minus one: weight_offset 1.
    """
    if uses_triton(x, weight):
        from llmd_kernels.rms_norm import triton_ops

        return triton_ops.rms_norm(x, weight, eps, weight_offset=weight_offset)
    return torch_ops.rms_norm(x, weight, eps, weight_offset=weight_offset)
