"""The truth of `quantized_linear`: every weight from its definition, one sum per output. Any float dtype of x."""

import torch
from torch import Tensor

from llmd_kernels.quantized_linear.weights import (
    FLOAT4_GROUP,
    FLOAT4_MAGNITUDES,
    Float4Weight,
    Float8Weight,
    IntWeight,
    QuantizedWeight,
    integers,
    scales_and_zeros,
)


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """y[t, n] = sum over k of x[t, k] · weight[n, k], plus bias[n]."""
    if isinstance(weight, IntWeight) and weight.input_order is not None:
        x = x[:, weight.input_order]
    y = (x[:, None, :] * numbers(weight, x.dtype)[None, :, :]).sum(dim=-1)
    return y if bias is None else y + bias


def numbers(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """weight[n, k] by its definition [N, K], without rounding in float64; integers in the order of `input_order`."""
    n = torch.arange(weight.num_outputs)[:, None]
    k = torch.arange(weight.num_inputs)[None, :]
    if isinstance(weight, Float8Weight):
        block_outputs, block_inputs = weight.block
        return weight.scales[n // block_outputs, k // block_inputs].to(dtype) * weight.values.to(dtype)
    if isinstance(weight, Float4Weight):
        codes, exponents = integers(weight), weight.exponents[k // FLOAT4_GROUP, n]
        powers = torch.ldexp(torch.ones(exponents.shape, dtype=dtype), exponents.int() - 127)
        signed = torch.tensor([*FLOAT4_MAGNITUDES, *(-each for each in FLOAT4_MAGNITUDES)], dtype=dtype)
        return signed[codes.int()] * torch.where(exponents == 255, torch.nan, powers)
    scales, zeros = scales_and_zeros(weight)
    groups = k // weight.group_size
    return scales[groups, n].to(dtype) * (integers(weight).to(dtype) - zeros[groups, n].to(dtype))
