"""Work lists that are planned on the device, in memory that stays: one captured launch serves every step of a bucket.

Knows what there is to allocate for a bucket (so many sequences and tokens, contexts of at most so many tokens); the
planning itself is plan_kernel.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmd_kernels.paged_attention.items import (
    FIELDS,
    ItemCut,
    extra_items,
    max_partial_rows,
    max_shared_tiles,
    max_tiles,
)
from llmd_kernels.paged_attention.tiles import TileConfig, padded_dim
from llmd_kernels.paged_attention.workspace import (
    LayerKind,
    Scratch,
    Workspace,
    allocate_scratch,
    cut_for,
    no_list_for,
)

# What planning keeps of each tile: as in an item, except for the last two.
TILE_FIELDS = (
    "table_row",
    "first_row",
    "num_queries",
    "first_position",
    "first_split",
    "end_split",
    "num_parts",
    "partial_row",
    "counter",
    "first_full",  # the first of its items that have a whole run of splits, counted over all tiles
    "rest",  # splits of its last item
)


@dataclass(frozen=True, slots=True)
class DeviceList:
    """The work list of one kind of layer, and what planning it needs."""

    cut: ItemCut
    workspace: Workspace
    tile_starts: Tensor  # [max_seqs] int32: each sequence's first tile
    tiles: Tensor  # [len(TILE_FIELDS), max_tiles] int32


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """The work lists of a bucket, one a kind of layer: WorkLists that the device plans."""

    lists: Mapping[LayerKind, DeviceList]
    scratch: Scratch

    def plan(self, query_starts: Tensor, kv_lens: Tensor, places: Tensor | None = None) -> None:
        """Make all lists for a step (tensors as in AttentionBatch, of the bucket's size), without waiting for it."""
        # Takes time to import, and is not there on every machine.
        from llmd_kernels.paged_attention.plan_kernel import plan_on_device

        for planned in self.lists.values():
            plan_on_device(planned, query_starts, kv_lens, places)

    def workspace(self, kind: LayerKind, cut: ItemCut) -> Workspace:
        planned = self.lists.get(kind)
        if planned is None or planned.cut != cut:
            raise no_list_for(kind, cut, self.lists)
        return planned.workspace


def allocate_lists(
    configs: Mapping[LayerKind, TileConfig],
    *,
    max_seqs: int,
    max_tokens: int,
    max_len: int,
    num_processors: int,
    device: torch.device,
    scratch: Scratch | None = None,
) -> AttentionWork:
    """As the public `allocate_work`, with the tiling of each kind and the number of processors of the device."""
    lists: dict[LayerKind, tuple[ItemCut, int]] = {}
    num_values = num_sums = num_counters = 0
    for kind, config in configs.items():
        cut = cut_for(kind, config, num_processors)
        num_tiles = max_tiles(max_seqs, max_tokens, cut)
        lists[kind] = cut, num_tiles
        partial_rows = max_partial_rows(num_tiles, max_len, cut) * cut.num_kv_heads
        num_values = max(num_values, partial_rows * padded_dim(kind.head_dim))
        num_sums = max(num_sums, partial_rows * 2)
        num_counters = max(num_counters, max_shared_tiles(num_tiles, cut) * cut.num_kv_heads)
    if scratch is None:
        scratch = allocate_scratch(num_values, num_sums, num_counters, device)
    elif any(
        len(has) < needed
        for has, needed in (
            (scratch.partial_values, num_values),
            (scratch.partial_sums, num_sums),
            (scratch.counters, num_counters),
        )
    ):
        raise ValueError("the scratch is of a smaller bucket: allocate for the largest one first")
    return AttentionWork(
        {kind: _allocate_list(cut, num_tiles, max_seqs, scratch, device) for kind, (cut, num_tiles) in lists.items()},
        scratch,
    )


def _allocate_list(cut: ItemCut, num_tiles: int, max_seqs: int, scratch: Scratch, device: torch.device) -> DeviceList:
    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    max_items = num_tiles + extra_items(cut)
    return DeviceList(
        cut,
        Workspace(max_items * cut.num_kv_heads, ints(2), ints(max_items, len(FIELDS)), scratch),
        tile_starts=ints(max_seqs),
        tiles=ints(len(TILE_FIELDS), num_tiles),
    )
