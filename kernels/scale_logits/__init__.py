"""What stands between the last linear's products and logits: a divisor and a soft cap."""

from torch import Tensor

from llmd_kernels.dispatch import uses_triton
from llmd_kernels.scale_logits import torch_ops


def scale_logits(products: Tensor, *, divisor: float = 1.0, soft_cap: float | None = None) -> Tensor:
    """products [R, V] of any float dtype → logits [R, V] float32: cap · tanh(products / divisor / cap), or no cap."""
    if uses_triton(products) and (divisor != 1 or soft_cap is not None):
        from llmd_kernels.scale_logits import triton_ops

        return triton_ops.scale_logits(products, divisor=divisor, soft_cap=soft_cap)
    return torch_ops.scale_logits(products, divisor=divisor, soft_cap=soft_cap)
