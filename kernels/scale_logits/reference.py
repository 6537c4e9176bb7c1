"""The truth of `scale_logits`. Any float dtype."""

import torch
from torch import Tensor


def scale_logits(products: Tensor, *, divisor: float = 1.0, soft_cap: float | None = None) -> Tensor:
    """Divided, then squeezed between -soft_cap and soft_cap."""
    logits = products / divisor
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
