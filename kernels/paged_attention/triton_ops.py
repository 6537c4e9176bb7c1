"""`paged_attention` as one Triton launch: prefill, decode and any mixture. See README.md, "On a GPU".

Bitwise the same row whatever else is in the step and however the prompt was cut, for one device kind and table entry.
"""

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from llmd_kernels.dispatch import gpu_of
from llmd_kernels.paged_attention.batch import AttentionBatch
from llmd_kernels.paged_attention.host_work import HostLens, pack_lists
from llmd_kernels.paged_attention.items import ItemCut
from llmd_kernels.paged_attention.tiles import BLOCK_SIZES, TileConfig, padded_dim
from llmd_kernels.paged_attention.triton_kernel import attend
from llmd_kernels.paged_attention.workspace import LayerKind, Workspace, cut_for

# Numbers of a padding row that are set to zero at a time.
ZEROS = 1024


@dataclass(frozen=True, slots=True)
class Processors:
    """What the tiling must know of a device."""

    arch: str  # "sm_90", "gfx942"
    number: int  # streaming multiprocessors or compute units


@functools.cache
def processors(device: torch.device) -> Processors:
    properties = torch.cuda.get_device_properties(gpu_of(device))
    is_amd = torch.version.hip is not None
    arch = properties.gcnArchName.split(":")[0] if is_amd else f"sm_{properties.major}{properties.minor}"
    return Processors(arch, properties.multi_processor_count)


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
    kind = LayerKind(num_heads, num_kv_heads, head_dim, window)
    cut = cut_for(kind, config, num_processors)
    space = _workspace(batch, kind, cut)
    scratch = space.scratch
    # Half of the bytes: a program reads a block's id once for each of its tokens.
    tables = batch.once("int32 block tables", batch.block_tables.int)
    out = torch.empty_like(q)
    if config.float8_by_bits:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    attend[(space.num_programs,)](
        q,
        k_cache,
        v_cache,
        scratch.partial_sums if k_scales is None else k_scales,
        scratch.partial_sums if v_scales is None else v_scales,
        scratch.partial_sums if sinks is None else sinks,
        out,
        tables,
        space.header,
        space.items,
        scratch.partial_values,
        scratch.partial_sums,
        scratch.counters,
        len(q),
        *_strides_in_rows(k_cache, v_cache),
        *((0, 0) if k_scales is None else k_scales.stride()[:2]),
        tables.stride(0),
        scale,
        soft_cap or 0.0,
        window or 0,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=cut.group,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        PAGE=block_size,
        ROWS=max(config.rows, triton.next_power_of_2(cut.group)),
        TILE=config.tile,
        SPLIT=config.split,
        HAS_SCALES=k_scales is not None,
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks is not None,
        # Without it, float32 products would be rounded to 10 bits of mantissa (tf32).
        PRECISION="ieee",
        ZEROS=ZEROS,
        FLOAT8_BY_BITS=config.float8_by_bits,
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


def _workspace(batch: AttentionBatch, kind: LayerKind, cut: ItemCut) -> Workspace:
    """The step's work list for layers of this kind. ValueError where a batch that stays has none."""
    if batch.work_lists is not None:
        return batch.work_lists.workspace(kind, cut)
    if batch.is_static:
        raise ValueError("a batch whose tensors are written anew for every step needs work_lists")
    return batch.once((kind, cut), lambda: _read_and_plan(batch, kind, cut))


def _read_and_plan(batch: AttentionBatch, kind: LayerKind, cut: ItemCut) -> Workspace:
    """Waits for the device: the host does not know the lengths."""
    places = None if batch.places is None else batch.places.cpu().numpy()
    lens = HostLens(batch.query_starts.cpu().numpy(), batch.kv_lens.cpu().numpy(), places)
    packed = pack_lists({kind: cut}, lens)
    on_device = torch.from_numpy(packed.numbers).to(batch.block_tables.device)
    return packed.on_device(on_device).workspace(kind, cut)
