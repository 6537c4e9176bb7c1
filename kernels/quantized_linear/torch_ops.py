"""`quantized_linear` without a kernel of its own: PyTorch dequantises the weight at every call, then `linear`."""

from torch import Tensor

from llmd_kernels.linear import linear
from llmd_kernels.quantized_linear.weights import QuantizedWeight, dequantized


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Right everywhere, slow: who calls often on such a device dequantises once."""
    return linear(x, dequantized(weight, x.dtype), bias)
