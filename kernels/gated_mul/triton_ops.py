"""`gated_mul` in Triton: elementwise, so that every bit depends on its own two inputs alone."""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of a program: two vectors of eight 16-bit numbers a thread of four warps.
BLOCK = 2048
NUM_WARPS = 4


def gated_mul(gate_up: Tensor, activation: Literal["silu", "gelu_tanh", "gelu", "clamped_silu"]) -> Tensor:
    """Computed in float32, rounded once."""
    num_rows, intermediate_size = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    y = torch.empty(num_rows, intermediate_size, dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        gated_mul_kernel[(num_rows, triton.cdiv(intermediate_size, BLOCK))](
            gate_up,
            y,
            gate_up.stride(0),
            SIZE=intermediate_size,
            ACTIVATION=activation,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return y


@triton.jit
def gated_mul_kernel(gate_up, y, stride, SIZE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """gate_up [T, 2·SIZE] with rows `stride` apart → y [T, SIZE]; a program takes BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    gate = tl.load(gate_up + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * SIZE + columns, gated(gate, up, ACTIVATION), mask=mask)


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) · up, float32 numbers of any shape."""
    if ACTIVATION == "silu":
        activated = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2u; 1.5957691 = 2 · sqrt(2 / pi).
        activated = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    elif ACTIVATION == "clamped_silu":
        # A minimum would hide what is not a number.
        gate = tl.where(gate > 7.0, 7.0, gate)
        activated = gate / (1.0 + tl.exp(-1.702 * gate))
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0
    else:
        tl.static_assert(ACTIVATION == "gelu")
        activated = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    return activated * up
