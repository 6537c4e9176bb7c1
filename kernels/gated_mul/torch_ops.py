"""`gated_mul` from operators that give the same bits at any place of a tensor.

PyTorch's own silu and gelu differ in the last bit between the vector body and the scalar tail of a loop, and threads
put the tails anywhere; exp, tanh and erf (one library call for body and tail) and plain arithmetic do not.
"""

import math
from typing import Literal

import torch
from torch import Tensor


def gated_mul(gate_up: Tensor, activation: Literal["silu", "gelu_tanh", "gelu", "clamped_silu"]) -> Tensor:
    """Computed in float32 at least, rounded once."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    if activation == "silu":
        activated = gate / torch.neg(gate).exp_().add_(1)
    elif activation == "gelu_tanh":
        inner = gate.square().mul_(0.044715).add_(1).mul_(gate).mul_(math.sqrt(2 / math.pi))
        activated = inner.tanh_().add_(1).mul_(gate).mul_(0.5)
    elif activation == "clamped_silu":
        gate, up = gate.clamp(max=7), up.clamp(min=-7, max=7).add_(1)
        activated = gate / gate.mul(-1.702).exp_().add_(1)
    else:
        activated = gate.mul(math.sqrt(0.5)).erf_().add_(1).mul_(gate).mul_(0.5)
    return activated.mul_(up).to(gate_up.dtype)
