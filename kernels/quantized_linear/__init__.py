"""y = x · weightᵀ + bias with a weight of 4-bit or 8-bit integers or of float8; x stays as it is."""

from torch import Tensor

from llmd_kernels.quantized_linear.weights import (
    Float8Weight,
    IntWeight,
    QuantizedWeight,
    dequantized,
    pack_int_weight,
)

__all__ = ["Float8Weight", "IntWeight", "QuantizedWeight", "dequantized", "pack_int_weight", "quantized_linear"]


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight of N outputs and K inputs, bias [N] or None → [T, N] in x's dtype; any T, also 0.

    The same bits as `linear(x, dequantized(weight, x.dtype), bias)`, so those of a row depend on no other row.
    """
    # Imported here: it stands on `linear`, which hands quantised weights to this function.
    from llmd_kernels.quantized_linear import torch_ops

    return torch_ops.quantized_linear(x, weight, bias)
