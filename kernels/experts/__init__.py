"""The gated MLPs that a token's router has chosen, weighed and added up."""

from typing import Literal

from torch import Tensor

from llmd_kernels.dispatch import uses_triton
from llmd_kernels.experts import torch_ops
from llmd_kernels.quantized_linear.weights import QuantizedWeight


def experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    *,
    activation: Literal["silu", "gelu_tanh", "gelu", "clamped_silu"],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """x [T, H], expert_ids and weights [T, C] as `route` gives them → [T, H] in x's dtype; any T, also 0.

    y[t] = sum over c of weights[t, c] · MLP of expert expert_ids[t, c] (x[t]), added in float32 in the order of c,
    rounded once. An MLP is down · `gated_mul`(gate_up · x + gate_up_bias, activation) + down_bias, with the part of its
    expert in gate_up [E, 2·I, H] (the gate's rows, then up's), down [E, H, I], gate_up_bias [E, 2·I], down_bias [E, H].
    An id outside of [0, E), such as that of another rank's expert, stands for no expert and adds nothing.

    A quantised stack is one weight of all experts' outputs, [E·2·I, H] or [E·H, I], without an order of inputs. It
    gives the bits that `dequantized` numbers give.

    A row of the result is bitwise the same whatever the other rows are and however many there are. On a GPU it
    needs no word from the device to the host.
    """
    tensors = [tensor for tensor in (gate_up, down, gate_up_bias, down_bias) if isinstance(tensor, Tensor)]
    arguments = (x, expert_ids, weights, gate_up, down, activation, gate_up_bias, down_bias)
    if uses_triton(x, *tensors):
        from llmd_kernels.experts import triton_ops

        return triton_ops.experts(*arguments)
    return torch_ops.experts(*arguments)
