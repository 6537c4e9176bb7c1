"""y = x · weightᵀ + bias with a weight of 4-bit or 8-bit integers, of float8 or of MXFP4; x stays as it is."""

import torch
from torch import Tensor

from llmd_kernels.dispatch import uses_triton
from llmd_kernels.quantized_linear.weights import (
    Float4Weight,
    Float8Weight,
    IntWeight,
    QuantizedWeight,
    dequantized,
    float4_numbers,
    pack_float4_weight,
    pack_int_weight,
)

__all__ = [
    "Float4Weight",
    "Float8Weight",
    "IntWeight",
    "QuantizedWeight",
    "dequantized",
    "float4_numbers",
    "pack_float4_weight",
    "pack_int_weight",
    "quantized_linear",
]


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight of N outputs and K inputs, bias [N] or None → [T, N] in x's dtype; any T, also 0.

    The same bits as `linear(x, dequantized(weight, x.dtype), bias)`, so those of a row depend on no other row.
    """
    # Imported here: they stand on `linear`, which hands quantised weights to this function.
    if uses_triton(x) and x.dtype != torch.float32:
        from llmd_kernels.quantized_linear import triton_ops

        return triton_ops.quantized_linear(x, weight, bias)
    from llmd_kernels.quantized_linear import torch_ops

    return torch_ops.quantized_linear(x, weight, bias)
