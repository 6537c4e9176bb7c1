"""The truth of `top_tokens`: sort everything."""

import torch
from torch import Tensor


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k of a stable sort."""
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]
