"""`linear_draw` with the operations that it fuses."""

from torch import Tensor

from llmd_kernels.linear import linear
from llmd_kernels.sample.torch_device import noisy
from llmd_kernels.scale_logits import scale_logits


def linear_draw(
    x: Tensor,
    weight: Tensor,
    temperatures: Tensor,
    *,
    seeds: Tensor,
    choices: Tensor,
    positions: Tensor,
    divisor: float = 1.0,
    soft_cap: float | None = None,
) -> Tensor:
    """argmax gives the lowest id of equal ones."""
    logits = scale_logits(linear(x, weight), divisor=divisor, soft_cap=soft_cap)
    return noisy(logits, temperatures, seeds=seeds, choices=choices, positions=positions).argmax(dim=1)
