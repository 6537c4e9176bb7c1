"""The truth of `rms_norm`. Any float dtype; computes in the input's own dtype, so give it float64."""

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0) -> Tensor:
    """y[t, h] = x[t, h] / sqrt(mean over h of x² + eps) · (weight[h] + weight_offset)."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * (weight + weight_offset)
