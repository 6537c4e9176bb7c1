"""The truth of `gated_mul`, each activation written out. Any float dtype."""

import math
from typing import Literal

import torch
from torch import Tensor


def gated_mul(gate_up: Tensor, activation: Literal["silu", "gelu_tanh", "gelu", "clamped_silu"]) -> Tensor:
    """y[t, i] = activation(gate_up[t, i]) · gate_up[t, I + i]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + torch.tanh(inner)) * up
    if activation == "clamped_silu":
        gate, up = gate.clamp(max=7), up.clamp(min=-7, max=7)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    return 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * up
