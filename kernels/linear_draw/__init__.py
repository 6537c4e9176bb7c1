"""The last linear and the draw in one: logits are never written."""

from torch import Tensor

from llmd_kernels.dispatch import uses_triton
from llmd_kernels.linear_draw import torch_ops


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
    """x [R, H], weight [V, H] of the same dtype → the token of each row, [R] int64; nothing is read back.

    For rows that are greedy or draw from all tokens, without penalties, biases and bitmask. temperatures [R] float32,
    seeds [R] int64, choices and positions [R] int32: as in `DeviceSampling`. On a GPU bitwise the same token as
    `linear`, `scale_logits` and `sample_on_device` one after another.
    """
    keys = {"seeds": seeds, "choices": choices, "positions": positions}
    # What was packed for a CPU has no rows to point at.
    if uses_triton(x, weight) and not weight.is_mkldnn:
        from llmd_kernels.linear_draw import triton_ops

        return triton_ops.linear_draw(x, weight, temperatures, **keys, divisor=divisor, soft_cap=soft_cap)
    return torch_ops.linear_draw(x, weight, temperatures, **keys, divisor=divisor, soft_cap=soft_cap)
