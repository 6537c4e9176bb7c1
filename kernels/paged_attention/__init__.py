"""Causal attention of a step's tokens over their sequences' paged K and V: prefill, decode and any mixture."""

from torch import Tensor

from llmd_kernels.paged_attention import torch_ops
from llmd_kernels.paged_attention.batch import AttentionBatch

__all__ = ["AttentionBatch", "paged_attention"]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [T, num_heads, D] → [T, num_heads, D] in q's dtype; padding rows are zeros.

    k_cache, v_cache [num_blocks, num_kv_heads, block_size, D], of any float dtype, finite everywhere; query head h
    reads KV head h // (num_heads / num_kv_heads).
    scale: of the scores. window: a query at p sees the keys p - window + 1 … p; None = 0 … p.
    soft_cap: scores become soft_cap · tanh(score / soft_cap). sinks [num_heads]: one more score a head, without a
    value, in the denominator only.
    """
    return torch_ops.paged_attention(
        q, k_cache, v_cache, batch, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks
    )
