"""Attention as others compute it, on the same numbers: torch's SDPA and flex_attention, and FlashInfer where it is."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.contexts import Contexts
from bench.gpu.machine import Call, Machine
from llmd_kernels import AttentionBatch

_FLASHINFER_WORKSPACE = 128 << 20  # bytes, as its documents advise


def attention(
    machine: Machine, contexts: Contexts, step: tuple[Tensor, Tensor, Tensor, AttentionBatch], *, num_queries: int
) -> dict[str, Call]:
    """All sequences have one length. SDPA and flex_attention read keys that lie together, which flatters them."""
    q = step[0].unflatten(0, (len(contexts.lens), num_queries)).transpose(1, 2)
    k, v = (_together(contexts, cache) for cache in (contexts.k_cache, contexts.v_cache))
    is_prefill = num_queries > 1
    calls: dict[str, Call] = {
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=is_prefill, enable_gqa=True),
        "flex_attention": _flex_attention(machine, q, k, v, is_prefill=is_prefill),
    }
    if importlib.util.find_spec("flashinfer"):
        calls["FlashInfer"] = _flashinfer(contexts, step, num_queries=num_queries)
    return calls


def _together(contexts: Contexts, cache: Tensor) -> Tensor:
    """[num_seqs, num_kv_heads, length, D]"""
    blocks = cache[contexts.block_tables].transpose(1, 2)
    return blocks.flatten(2, 3)[:, :, : contexts.lens[0]].contiguous()


def _flex_attention(machine: Machine, q: Tensor, k: Tensor, v: Tensor, *, is_prefill: bool) -> Call:
    """Compiled at the first call, so that what it lacks is an error of that call."""

    def call() -> object:
        mask = _causal_mask(q.shape[2], q.device) if is_prefill else None
        return _compiled_flex_attention(machine)(q, k, v, block_mask=mask, enable_gqa=True)

    return call


@functools.cache
def _compiled_flex_attention(machine: Machine) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return machine.compiled(flex_attention)


@functools.cache
def _causal_mask(length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(_causal, None, None, length, length, device=device)


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _flashinfer(contexts: Contexts, step: tuple[Tensor, Tensor, Tensor, AttentionBatch], *, num_queries: int) -> Call:
    """Its paged prefill kernel, which uses the matrix units for grouped heads in decode too. Planned at first call."""

    @functools.cache
    def planned() -> Any:
        import flashinfer

        q, k_cache = step[:2]
        per_seq = -(-contexts.lens[0] // contexts.block_size)
        num_seqs = len(contexts.lens)
        ints = functools.partial(torch.arange, dtype=torch.int32, device=q.device)
        workspace = torch.empty(_FLASHINFER_WORKSPACE, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, kv_layout="HND")
        wrapper.plan(
            ints(num_seqs + 1) * num_queries,
            ints(num_seqs + 1) * per_seq,
            contexts.block_tables[:, :per_seq].int().flatten(),
            torch.full_like(ints(num_seqs), contexts.lens[0] - (per_seq - 1) * contexts.block_size),
            q.shape[1],
            k_cache.shape[1],
            q.shape[2],
            contexts.block_size,
            causal=True,
            q_data_type=q.dtype,
        )
        return wrapper

    return lambda: planned().run(step[0], (contexts.k_cache, contexts.v_cache))
