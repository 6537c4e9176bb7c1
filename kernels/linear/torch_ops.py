"""`linear` with PyTorch's matrix product, rows padded so that the library never meets an odd number of them."""

import torch.nn.functional as F
from torch import Tensor

# MKL sums a row in the same order for every number of rows that is a multiple of this, and in other orders for others.
ROW_MULTIPLE = 8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Pad the rows up to a multiple of ROW_MULTIPLE, multiply, cut."""
    num_rows = x.shape[0]
    padding = -num_rows % ROW_MULTIPLE
    if padding == 0:
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, padding)), weight, bias)[:num_rows]
