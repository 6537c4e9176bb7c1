"""The truth of `experts`: every token and each of its experts by itself. Any float dtype."""

from typing import Literal

import torch
from torch import Tensor

from llmd_kernels.gated_mul.reference import gated_mul
from llmd_kernels.linear.reference import linear


def experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Literal["silu", "gelu_tanh", "gelu", "clamped_silu"],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """y[t] = sum over the chosen e of weight · (down[e] · gated_mul(gate_up[e] · x[t]))."""
    y = torch.zeros_like(x)
    for token, chosen in enumerate(expert_ids.tolist()):
        for choice, expert in enumerate(chosen):
            if not 0 <= expert < len(down):
                continue
            inner = linear(
                x[token : token + 1], gate_up[expert], None if gate_up_bias is None else gate_up_bias[expert]
            )
            outer = linear(gated_mul(inner, activation), down[expert], None if down_bias is None else down_bias[expert])
            y[token] += weights[token, choice] * outer[0]
    return y
