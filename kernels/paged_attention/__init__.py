"""Causal attention of a step's tokens over their sequences' paged K and V: prefill, decode and any mixture."""

from torch import Tensor

from llmd_kernels.dispatch import uses_triton
from llmd_kernels.paged_attention import torch_ops
from llmd_kernels.paged_attention.batch import AttentionBatch
from llmd_kernels.paged_attention.tiles import BLOCK_SIZES, find_config

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
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """q [T, num_heads, D] → [T, num_heads, D] in q's dtype; padding rows are zeros.

    k_cache, v_cache [num_blocks, num_kv_heads, block_size, D], of any float dtype, finite everywhere; query head h
    reads KV head h // (num_heads / num_kv_heads).
    scale: of the scores. window: a query at p sees the keys p - window + 1 … p; None = 0 … p.
    soft_cap: scores become soft_cap · tanh(score / soft_cap). sinks [num_heads]: one more score a head, without a
    value, in the denominator only. k_scales, v_scales [num_blocks, num_kv_heads, block_size] float32: what a token's
    K and V were divided by when they were written (float8 caches).
    """
    scales = {"k_scales": k_scales, "v_scales": v_scales}
    if uses_triton(q):
        # Takes time to import, and is not there on every machine.
        from llmd_kernels.paged_attention import triton_ops

        processors = triton_ops.processors(q.device)
        config = find_config(processors.arch, q.shape[2], q.dtype, k_cache.dtype)
        if config is not None and batch.block_size in BLOCK_SIZES:
            return triton_ops.paged_attention(
                q,
                k_cache,
                v_cache,
                batch,
                scale=scale,
                window=window,
                soft_cap=soft_cap,
                sinks=sinks,
                **scales,
                config=config,
                num_processors=processors.number,
            )
    return torch_ops.paged_attention(
        q, k_cache, v_cache, batch, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, **scales
    )
