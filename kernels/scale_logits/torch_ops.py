"""`scale_logits` with PyTorch operators: what a model does not have is left out."""

import torch
from torch import Tensor


def scale_logits(products: Tensor, *, divisor: float = 1.0, soft_cap: float | None = None) -> Tensor:
    """In float32."""
    logits = products.float()
    if divisor != 1:
        logits = logits / divisor
    return logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap
