"""`rms_norm` with PyTorch operators: each exactly rounded or reduced row by row, so rows do not depend on others."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0) -> Tensor:
    """Computed in float32 at least, rounded once."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    wide_weight = weight.to(dtype) if weight_offset == 0 else weight.to(dtype) + weight_offset
    return wide.mul(scale).mul_(wide_weight).to(x.dtype)
