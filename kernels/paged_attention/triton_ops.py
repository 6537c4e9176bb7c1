"""`paged_attention` as one Triton launch: prefill, decode and any mixture. See README.md, "On a GPU".

Bitwise the same row whatever else is in the step and however the prompt was cut, for one device kind and table entry.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from llmd_kernels.paged_attention.batch import AttentionBatch
from llmd_kernels.paged_attention.items import FIELDS, ItemCut, plan_items
from llmd_kernels.paged_attention.tiles import BLOCK_SIZES, TileConfig, padded_dim
from llmd_kernels.paged_attention.triton_kernel import attend

# Bytes of partial results of one step, at most; tiles for which there is no room are attended by one program each.
MAX_PARTIAL_BYTES = 64 << 20
# Numbers of a padding row that are set to zero at a time.
ZEROS = 1024


@dataclass(frozen=True, slots=True)
class Processors:
    """What the tiling must know of a device."""

    arch: str  # "sm_90", "gfx942"
    number: int  # streaming multiprocessors or compute units


@functools.cache
def processors(device: torch.device) -> Processors:
    properties = torch.cuda.get_device_properties(device)
    is_amd = torch.version.hip is not None
    arch = properties.gcnArchName.split(":")[0] if is_amd else f"sm_{properties.major}{properties.minor}"
    return Processors(arch, properties.multi_processor_count)


@dataclass(frozen=True, slots=True)
class Workspace:
    """A step's work list on the device, and room for what its programs hand to each other. Serves all layers."""

    num_programs: int
    header: Tensor  # [2] int32: number of items, rows of Q that are not padding
    items: Tensor  # [num_items, len(FIELDS)] int32
    partial_values: Tensor  # [num_partial_rows · num_kv_heads, padded head_dim] float32
    partial_sums: Tensor  # [num_partial_rows · num_kv_heads, 2] float32: largest score and total
    counters: Tensor  # [num_counters, num_kv_heads] int32: zero before and after each launch


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
    config: TileConfig,
    num_processors: int,
) -> Tensor:
    """As the public function, with the tiling and the number of processors (SMs, CUs) of the device.

    The caches lie alike, in whole rows of D numbers. ValueError where the sizes are none that the kernel can address.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block size {block_size} is not one of {BLOCK_SIZES}")
    if (k_scales is None) != (v_scales is None):
        raise ValueError("give scales for both K and V, or for neither")
    if q.numel() >= 1 << 31:
        raise ValueError(f"{len(q)} rows of q are more than 32 bits can count")
    q = q.contiguous()
    group = num_heads // num_kv_heads
    rows = max(config.rows, triton.next_power_of_2(group))
    cut = ItemCut(
        tile_queries=rows // group,
        split=config.split,
        num_kv_heads=num_kv_heads,
        group=group,
        window=window,
        wanted_programs=num_processors * config.programs_per_processor,
        max_partial_rows=MAX_PARTIAL_BYTES // (4 * padded_dim(head_dim) * num_kv_heads),
    )
    space = batch.once((cut, head_dim), lambda: _workspace(batch, cut, padded_dim(head_dim)))
    # Half of the bytes: a program reads a block's id once for each of its tokens.
    tables = batch.once("int32 block tables", batch.block_tables.int)
    out = torch.empty_like(q)
    attend[(space.num_programs,)](
        q,
        k_cache,
        v_cache,
        space.partial_sums if k_scales is None else k_scales,
        space.partial_sums if v_scales is None else v_scales,
        space.partial_sums if sinks is None else sinks,
        out,
        tables,
        space.header,
        space.items,
        space.partial_values,
        space.partial_sums,
        space.counters,
        len(q),
        *_strides_in_rows(k_cache, v_cache),
        *((0, 0) if k_scales is None else k_scales.stride()[:2]),
        tables.stride(0),
        scale,
        soft_cap or 0.0,
        window or 0,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        PAGE=block_size,
        ROWS=rows,
        TILE=config.tile,
        SPLIT=config.split,
        HAS_SCALES=k_scales is not None,
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks is not None,
        # Without it, float32 products would be rounded to 10 bits of mantissa (tf32).
        PRECISION="ieee",
        ZEROS=ZEROS,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _strides_in_rows(k_cache: Tensor, v_cache: Tensor) -> tuple[int, int, int]:
    """Steps from block to block, head to head and token to token, in rows of head_dim numbers."""
    head_dim = k_cache.shape[3]
    strides = k_cache.stride()
    if strides != v_cache.stride() or strides[3] != 1 or any(stride % head_dim for stride in strides[:3]):
        raise ValueError(f"K and V must lie alike, in whole rows: strides {strides} and {v_cache.stride()}")
    if k_cache.shape[0] * strides[0] // head_dim >= 1 << 31:
        raise ValueError(f"a cache of {k_cache.shape[0]} blocks has too many rows for 32 bits")
    return strides[0] // head_dim, strides[1] // head_dim, strides[2] // head_dim


def _workspace(batch: AttentionBatch, cut: ItemCut, dim: int) -> Workspace:
    work = plan_items(batch.query_starts.cpu().numpy(), batch.kv_lens.cpu().numpy(), cut)
    device = batch.block_tables.device
    # At least one program and one place of each kind: a step may be padding only, and no pointer may be null.
    num_programs = max(1, len(work.items) * cut.num_kv_heads)
    partial_rows = max(1, work.num_partial_rows * cut.num_kv_heads)
    plan = np.concatenate([np.array([len(work.items), work.num_rows], dtype=np.int32), work.items.reshape(-1)])
    # One copy for both; the list begins at a multiple of 8 bytes.
    on_device = torch.from_numpy(plan).to(device, non_blocking=True)
    return Workspace(
        num_programs=num_programs,
        header=on_device[:2],
        items=on_device[2:].view(-1, len(FIELDS)),
        partial_values=torch.empty(partial_rows, dim, dtype=torch.float32, device=device),
        partial_sums=torch.empty(partial_rows, 2, dtype=torch.float32, device=device),
        counters=torch.zeros(max(1, work.num_counters), cut.num_kv_heads, dtype=torch.int32, device=device),
    )
