"""`paged_attention` with PyTorch operators: gather spans of K and V, two batched products, an ordered combination.

Bitwise the same row whatever else is in the step: see README.md, "Batch invariance".
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmd_kernels.paged_attention.batch import AttentionBatch
from llmd_kernels.paged_attention.work import Cut, Slab, TileGroup

# Stands for the largest score of a span in which a query sees nothing. Finite, so that differences stay numbers.
NOTHING_SEEN = -1e30


@dataclass(frozen=True, slots=True)
class Cache:
    """K or V of all blocks."""

    numbers: Tensor  # [num_blocks, num_kv_heads, block_size, D]
    scales: Tensor | None  # [num_blocks, num_kv_heads, block_size]: to be multiplied with


@dataclass(frozen=True, slots=True)
class Partial:
    """Softmax over one span, for each item of a tile group. `num_rows` as in TileGroup."""

    largest: Tensor  # [num_items, num_kv_heads, num_rows]: the largest score
    total: Tensor  # [num_items, num_kv_heads, num_rows]: sum of exp(score - largest)
    values: Tensor  # [num_items, num_kv_heads, num_rows, D]: sum of exp(score - largest) · V


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
    """Computed in float32 at least."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[1]
    cut = Cut(batch.block_size, num_kv_heads, num_heads // num_kv_heads, head_dim, window)
    scaled = q.to(torch.promote_types(q.dtype, torch.float32)) * scale
    out = torch.zeros_like(q)
    for group in batch.work(cut):
        queries = _tiles_of(scaled.index_select(0, group.query_rows), group, cut)
        partial = _partial(queries, Cache(k_cache, k_scales), Cache(v_cache, v_scales), group, soft_cap=soft_cap)
        combined = _combine(partial, group.tiles, _start(queries, sinks, cut))
        out[group.used_rows] = _rows_of(combined, group, cut).index_select(0, group.used_places).to(q.dtype)
    return out


def _tiles_of(rows: Tensor, group: TileGroup, cut: Cut) -> Tensor:
    """Q [num_tiles · tile_size, num_heads, D] → [num_tiles, num_kv_heads, num_rows, D], rows filled up with zeros."""
    heads = rows.view(-1, group.tile_size, cut.num_kv_heads, cut.group, cut.head_dim)
    tiles = heads.transpose(1, 2).flatten(2, 3)
    return F.pad(tiles, (0, 0, 0, group.num_rows - tiles.shape[2])).contiguous()


def _rows_of(tiles: Tensor, group: TileGroup, cut: Cut) -> Tensor:
    """The way back: [num_tiles, num_kv_heads, num_rows, D] → [num_tiles · tile_size, num_heads, D]."""
    used = tiles[:, :, : group.tile_size * cut.group]
    heads = used.reshape(-1, cut.num_kv_heads, group.tile_size, cut.group, cut.head_dim)
    return heads.transpose(1, 2).reshape(-1, cut.num_kv_heads * cut.group, cut.head_dim)


def _partial(queries: Tensor, k_cache: Cache, v_cache: Cache, group: TileGroup, *, soft_cap: float | None) -> Partial:
    """Attend each item of the group, slab by slab."""
    num_items, rows_shape = len(group.tiles), queries.shape[1:3]
    partial = Partial(
        largest=queries.new_empty(num_items, *rows_shape),
        total=queries.new_empty(num_items, *rows_shape),
        values=queries.new_empty(num_items, *queries.shape[1:]),
    )
    # One buffer for all slabs: fresh memory costs more (page faults) than what is written to it.
    gathered = k_cache.numbers.new_empty(len(group.slabs[0].cache_rows), k_cache.numbers[0, 0].numel())
    for slab in group.slabs:
        keys = _gather(k_cache, slab, gathered, queries.dtype)
        scores = torch.bmm(queries.index_select(0, slab.tiles).flatten(0, 1), keys.transpose(1, 2))
        if soft_cap is not None:
            scores.div_(soft_cap).tanh_().mul_(soft_cap)
        scores = scores.view(len(slab.tiles), *rows_shape, -1)
        if slab.hidden is not None:
            scores.masked_fill_(slab.hidden[:, None], float("-inf"))
        largest = torch.amax(scores, dim=-1, out=partial.largest[slab.items]).clamp_(min=NOTHING_SEEN)
        weights = scores.sub_(largest[..., None]).exp_()
        torch.sum(weights, dim=-1, out=partial.total[slab.items])
        values = _gather(v_cache, slab, gathered, queries.dtype)
        torch.bmm(weights.flatten(0, 1), values, out=partial.values[slab.items].flatten(0, 1))
    return partial


def _gather(cache: Cache, slab: Slab, buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """[num_blocks, num_kv_heads, block_size, D] → [num_items · num_kv_heads, span, D], the slab's spans in order."""
    numbers = cache.numbers
    head_blocks = buffer[: len(slab.cache_rows)]
    source, copied = numbers.flatten(0, 1).flatten(1, 2), head_blocks
    if numbers.dtype.itemsize == 1:
        # There is no index_select of float8: the same bytes as integers.
        source, copied = source.view(torch.uint8), copied.view(torch.uint8)
    torch.index_select(source, 0, slab.cache_rows, out=copied)
    spans = head_blocks.view(len(slab.tiles) * numbers.shape[1], -1, numbers.shape[3]).to(dtype)
    if cache.scales is None:
        return spans
    return spans * cache.scales.flatten(0, 1)[slab.cache_rows].view(*spans.shape[:2], 1).to(dtype)


def _start(queries: Tensor, sinks: Tensor | None, cut: Cut) -> Tensor:
    """The largest score before any key: [num_tiles, num_kv_heads, num_rows], each head's sink or nothing."""
    if sinks is None:
        return queries.new_full(queries.shape[:3], NOTHING_SEEN)
    heads_of_rows = torch.arange(queries.shape[2], device=queries.device) % cut.group
    sink_rows = sinks.to(queries.dtype).view(cut.num_kv_heads, cut.group)[:, heads_of_rows]
    return sink_rows.expand(queries.shape[:3]).contiguous()


def _combine(partial: Partial, tiles: Tensor, start: Tensor) -> Tensor:
    """One softmax from those of the spans: [num_tiles, num_kv_heads, num_rows, D].

    index_add_ adds the items one after the other, so the order is that of the spans for every tile.
    """
    largest = start.scatter_reduce(0, tiles[:, None, None].expand_as(partial.largest), partial.largest, "amax")
    share = (partial.largest - largest.index_select(0, tiles)).exp_()
    total = (start - largest).exp_().index_add_(0, tiles, partial.total * share)
    values = partial.values.new_zeros(*start.shape, partial.values.shape[-1])
    values.index_add_(0, tiles, partial.values.mul_(share[..., None]))
    return values.div_(total[..., None])
