"""A work list on the device, with room for what its programs hand to each other. Launches nothing."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmd_kernels.paged_attention.items import ItemCut
from llmd_kernels.paged_attention.tiles import TileConfig, padded_dim

# Bytes of partial results of one step, at most; tiles for which there is no room are attended by one program each.
MAX_PARTIAL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What the work lists of two layers may differ in."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Scratch:
    """What the programs of one launch hand to each other. Launches that follow one another may share it."""

    partial_values: Tensor  # [num_partial_rows · num_kv_heads · padded head_dim] float32, at least
    partial_sums: Tensor  # [num_partial_rows · num_kv_heads · 2] float32, at least: largest score and total
    counters: Tensor  # [num_counters · num_kv_heads] int32, at least: zero before and after each launch


@dataclass(frozen=True, slots=True)
class Workspace:
    """The work list of one kind of layer; serves all layers of that kind."""

    num_programs: int  # those for which there is no item end at once
    header: Tensor  # [2] int32: number of items, rows of Q that are not padding
    items: Tensor  # [max_items, len(FIELDS)] int32
    scratch: Scratch


class WorkLists(Protocol):
    """The work lists of a step, one a kind of layer, whoever has planned them."""

    def workspace(self, kind: LayerKind, cut: ItemCut) -> Workspace:
        """ValueError for a kind, or a cut, for which there is no list."""


def no_list_for(kind: LayerKind, cut: ItemCut, kinds: Iterable[LayerKind]) -> ValueError:
    return ValueError(f"no work list for {kind}, cut as {cut}: there are lists for {list(kinds)}")


def cut_for(kind: LayerKind, config: TileConfig, num_processors: int) -> ItemCut:
    """How steps are cut for these layers, on a device with so many processors (SMs, CUs)."""
    group = kind.num_heads // kind.num_kv_heads
    rows = max(config.rows, 1 << (group - 1).bit_length())
    return ItemCut(
        tile_queries=rows // group,
        split=config.split,
        num_kv_heads=kind.num_kv_heads,
        group=group,
        window=kind.window,
        wanted_programs=num_processors * config.programs_per_processor,
        max_partial_rows=MAX_PARTIAL_BYTES // (4 * padded_dim(kind.head_dim) * kind.num_kv_heads),
    )


def allocate_scratch(num_values: int, num_sums: int, num_counters: int, device: torch.device) -> Scratch:
    # At least one number of each: no pointer may be null.
    return Scratch(
        partial_values=torch.empty(max(1, num_values), dtype=torch.float32, device=device),
        partial_sums=torch.empty(max(1, num_sums), dtype=torch.float32, device=device),
        counters=torch.zeros(max(1, num_counters), dtype=torch.int32, device=device),
    )
