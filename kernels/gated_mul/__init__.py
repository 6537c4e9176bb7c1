"""The gate of a gated MLP: activation of one half times the other."""

from typing import Literal

from torch import Tensor

from llmd_kernels.dispatch import uses_triton
from llmd_kernels.gated_mul import torch_ops


def gated_mul(gate_up: Tensor, activation: Literal["silu", "gelu_tanh", "gelu", "clamped_silu"]) -> Tensor:
    """gate_up [T, 2·I] (gate, then up) → [T, I] in its dtype: activation(gate) · up, computed in float32 at least.

    "clamped_silu" is gpt-oss's: gate · sigmoid(1.702 · gate) · (up + 1) with gate ≤ 7 and −7 ≤ up ≤ 7.
    """
    if uses_triton(gate_up):
        from llmd_kernels.gated_mul import triton_ops

        return triton_ops.gated_mul(gate_up, activation)
    return torch_ops.gated_mul(gate_up, activation)
