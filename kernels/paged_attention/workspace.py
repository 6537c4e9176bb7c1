"""A work list on the device, with room for what its programs hand to each other. Launches nothing."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmd_kernels.paged_attention.items import FIELDS, ItemCut, ItemList
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


def workspace_from(work: ItemList, kind: LayerKind, device: torch.device) -> Workspace:
    """For a list that the host has made: one copy, without waiting for the device."""
    num_items = len(work.items)
    # The list begins at a multiple of 16 bytes, as one from the device does: the same compiled kernel takes both.
    plan = np.concatenate([np.array([num_items, work.num_rows, 0, 0], dtype=np.int32), work.items.reshape(-1)])
    on_device = to_device(plan, device)
    partial_rows = work.num_partial_rows * kind.num_kv_heads
    return Workspace(
        # At least one program: a step may be padding only.
        num_programs=max(1, num_items * kind.num_kv_heads),
        header=on_device[:2],
        items=on_device[4:].view(-1, len(FIELDS)),
        scratch=allocate_scratch(
            partial_rows * padded_dim(kind.head_dim), partial_rows * 2, work.num_counters * kind.num_kv_heads, device
        ),
    )


def to_device(numbers: npt.NDArray[np.int32], device: torch.device) -> Tensor:
    """Copy without waiting: only from pinned memory does a GPU fetch by itself."""
    on_host = torch.from_numpy(numbers)
    return (on_host.pin_memory() if device.type == "cuda" else on_host).to(device, non_blocking=True)
