"""`experts` with PyTorch's matrix products: for each expert those of the rows that chose it.

The rows of an expert are padded as `linear` pads them, so that their bits do not depend on how many there are.
"""

from typing import Literal

import torch
from torch import Tensor

from llmd_kernels.gated_mul.torch_ops import gated_mul
from llmd_kernels.linear.torch_ops import linear
from llmd_kernels.quantized_linear.weights import QuantizedWeight, dequantized


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
    """Each product rounded to x's dtype, their weighted sum taken in float32 at least and rounded once."""
    num_tokens, num_chosen = expert_ids.shape
    num_experts = count_experts(down, x.shape[1])
    gate_up, down = stacked(gate_up, num_experts, x.dtype), stacked(down, num_experts, x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    is_chosen = (expert_ids >= 0) & (expert_ids < num_experts)
    expert_ids, weights = expert_ids.masked_fill(~is_chosen, -1), weights.masked_fill(~is_chosen, 0)
    # Choices ordered by expert; those of no expert come first, and their rows stay zero.
    by_expert = expert_ids.flatten().sort(stable=True).indices
    counts = torch.bincount(expert_ids.flatten() + 1, minlength=num_experts + 1).tolist()
    chosen_y = x.new_zeros(num_tokens * num_chosen, x.shape[1])
    for expert, rows in enumerate(torch.split(by_expert, counts), start=-1):
        if expert >= 0 and len(rows):
            inner = linear(
                x[rows // num_chosen], gate_up[expert], None if gate_up_bias is None else gate_up_bias[expert]
            )
            outer = linear(gated_mul(inner, activation), down[expert], None if down_bias is None else down_bias[expert])
            chosen_y[rows] = outer
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for choice in range(num_chosen):
        y += weights[:, choice, None] * chosen_y[choice::num_chosen]
    return y.to(x.dtype)


def stacked(weight: Tensor | QuantizedWeight, num_experts: int, dtype: torch.dtype) -> Tensor:
    """As numbers [E, N, K]."""
    if isinstance(weight, Tensor):
        return weight
    return dequantized(weight, dtype).view(num_experts, -1, weight.num_inputs)


def count_experts(down: Tensor | QuantizedWeight, hidden_size: int) -> int:
    """How many the stack [E, H, I] has, also where it is one weight [E·H, I]."""
    return len(down) if isinstance(down, Tensor) else down.num_outputs // hidden_size
