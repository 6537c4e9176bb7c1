"""`linear` with PyTorch's matrix products, rows padded so that a library never meets an odd number of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

# MKL sums a row in the same order for every number of rows that is a multiple of this, and in other orders for others;
# oneDNN has another order for a single row.
ROW_MULTIPLE = 8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Pad the rows up to a multiple of ROW_MULTIPLE, multiply, cut."""
    num_rows = x.shape[0]
    padding = -num_rows % ROW_MULTIPLE
    if padding == 0:
        return _product(x, weight, bias)
    return _product(F.pad(x, (0, 0, 0, padding)), weight, bias)[:num_rows]


def pack_weight(weight: Tensor) -> Tensor:
    """oneDNN's blocked layout for float32 on a CPU; anything else stays as it is."""
    can_pack = weight.device.type == "cpu" and weight.dtype is torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not can_pack:
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not weight.is_mkldnn or x.shape[0] == 0:
        return F.linear(x, weight, bias) if x.shape[0] else x.new_zeros(0, weight.shape[0])
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return y
