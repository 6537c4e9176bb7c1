"""Causal attention of a step's tokens over their sequences' paged K and V: prefill, decode and any mixture."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmd_kernels.dispatch import uses_triton
from llmd_kernels.paged_attention import torch_ops
from llmd_kernels.paged_attention.batch import AttentionBatch
from llmd_kernels.paged_attention.device_work import AttentionWork, allocate_lists
from llmd_kernels.paged_attention.host_work import HostLens, PackedWork, pack_lists
from llmd_kernels.paged_attention.tiles import BLOCK_SIZES, TileConfig, find_config
from llmd_kernels.paged_attention.workspace import LayerKind, Scratch, WorkLists, cut_for

__all__ = [
    "AttentionBatch",
    "AttentionWork",
    "HostLens",
    "LayerKind",
    "PackedWork",
    "WorkLists",
    "allocate_work",
    "pack_work",
    "paged_attention",
]


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
    if q.is_meta:
        # its lengths cannot be read
        return torch.empty_like(q)
    return torch_ops.paged_attention(
        q, k_cache, v_cache, batch, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, **scales
    )


def allocate_work(
    kinds: Sequence[LayerKind],
    *,
    max_seqs: int,
    max_tokens: int,
    max_len: int,
    block_size: int,
    q_dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device,
    scratch: Scratch | None = None,
) -> AttentionWork | None:
    """Memory for the work lists of steps of at most max_seqs sequences, max_tokens tokens, contexts of max_len tokens.

    `plan` of the result makes the lists on the device; a launch of `paged_attention` with an AttentionBatch that has
    them may be captured, and serves all these steps. kinds: those of the model's layers. scratch: that of a larger
    bucket, whose launches never run at the same time.

    None where `paged_attention` would not use Triton for one of the kinds: it then waits for the device in every layer
    and cannot be captured. ValueError where the scratch is too small.
    """
    tiling = _tiling(kinds, block_size=block_size, q_dtype=q_dtype, cache_dtype=cache_dtype, device=device)
    if tiling is None:
        return None
    configs, num_processors = tiling
    return allocate_lists(
        configs,
        max_seqs=max_seqs,
        max_tokens=max_tokens,
        max_len=max_len,
        num_processors=num_processors,
        device=device,
        scratch=scratch,
    )


def pack_work(
    kinds: Sequence[LayerKind],
    lens: HostLens,
    *,
    block_size: int,
    q_dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device,
) -> PackedWork | None:
    """Plan the work lists of a step on the host, in one row of integers: it can be sent with the rest of the step.

    `on_device` of the result makes an AttentionBatch's `work_lists` of the copy. kinds: those of the model's layers.
    None where `paged_attention` would not use Triton for one of the kinds, as `allocate_work`.
    """
    tiling = _tiling(kinds, block_size=block_size, q_dtype=q_dtype, cache_dtype=cache_dtype, device=device)
    if tiling is None:
        return None
    configs, num_processors = tiling
    return pack_lists({kind: cut_for(kind, config, num_processors) for kind, config in configs.items()}, lens)


def _tiling(
    kinds: Sequence[LayerKind],
    *,
    block_size: int,
    q_dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device,
) -> tuple[dict[LayerKind, TileConfig], int] | None:
    """How these kinds are tiled, and the device's number of processors; None if `paged_attention` uses no Triton."""
    if not kinds or block_size not in BLOCK_SIZES or not uses_triton(torch.empty(0, dtype=q_dtype, device=device)):
        return None
    from llmd_kernels.paged_attention import triton_ops

    processors = triton_ops.processors(device)
    configs = {}
    for kind in kinds:
        config = find_config(processors.arch, kind.head_dim, q_dtype, cache_dtype)
        if config is None:
            return None
        configs[kind] = config
    return configs, processors.number
