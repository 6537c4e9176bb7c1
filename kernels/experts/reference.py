"""The truth of `experts`: every token and each of its experts by itself. Any float dtype."""

from typing import Literal

import torch
from torch import Tensor

from llmd_kernels.gated_mul.reference import gated_mul
from llmd_kernels.linear.reference import linear
from llmd_kernels.quantized_linear.reference import numbers
from llmd_kernels.quantized_linear.weights import QuantizedWeight


def experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    activation: Literal["silu", "gelu_tanh", "gelu", "clamped_silu"],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """y[t] = sum over the chosen e of weight · (down[e] · gated_mul(gate_up[e] · x[t]))."""
    num_experts = down.shape[0] if isinstance(down, Tensor) else down.num_outputs // x.shape[1]
    gate_up, down = (
        stack if isinstance(stack, Tensor) else numbers(stack, x.dtype).view(num_experts, -1, stack.num_inputs)
        for stack in (gate_up, down)
    )
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
