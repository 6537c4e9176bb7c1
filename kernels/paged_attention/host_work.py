"""Work lists that the host plans, from lengths that it knows: all of a step's in one row of integers.

Of each kind of layer, at a multiple of 16 bytes:

    header  number of items, rows of Q that are not padding; filled up to HEADER_SIZE
    items   FIELDS of items.py, one item after the other

So they can be sent to the device with whatever else a step sends. Launches nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from llmd_kernels.paged_attention.items import FIELDS, ItemCut, ItemList, plan_items
from llmd_kernels.paged_attention.tiles import padded_dim
from llmd_kernels.paged_attention.workspace import LayerKind, Scratch, Workspace, allocate_scratch, no_list_for

Numbers = npt.NDArray[np.int32]

HEADER_SIZE = 4
# Lists begin at multiples of so many numbers, as they would in memory of their own: one compiled kernel takes both.
_ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class HostLens:
    """What the tensors of an AttentionBatch say, where the host knows it."""

    query_starts: npt.NDArray[np.int64]  # [num_seqs + 1]
    kv_lens: npt.NDArray[np.int64]  # [num_seqs]
    places: npt.NDArray[np.int64] | None = None  # [num_seqs]; None where the batch has none


@dataclass(frozen=True, slots=True)
class PackedWork:
    """The work lists of one step, on the host."""

    numbers: Numbers  # to be copied to the device, to a multiple of 16 bytes
    cuts: Mapping[LayerKind, ItemCut]
    lists: Mapping[LayerKind, ItemList]

    def on_device(self, numbers: Tensor) -> "SentWork":
        """numbers: int32, begins with a copy of `numbers` on the device. Nothing is copied."""
        # Layers follow one another, so all kinds share what the programs of a launch hand to each other.
        sizes = zip(*(self._scratch_sizes(kind) for kind in self.lists), strict=True)
        num_values, num_sums, num_counters = map(max, sizes)
        scratch = allocate_scratch(num_values, num_sums, num_counters, numbers.device)
        workspaces: dict[LayerKind, Workspace] = {}
        start = 0
        for kind, work in self.lists.items():
            end = start + HEADER_SIZE + work.items.size
            workspaces[kind] = _workspace(numbers[start:end], work, kind, scratch)
            start = aligned(end)
        return SentWork(self.cuts, workspaces)

    def _scratch_sizes(self, kind: LayerKind) -> tuple[int, int, int]:
        """Of partial values, partial sums and counters."""
        work = self.lists[kind]
        partial_rows = work.num_partial_rows * kind.num_kv_heads
        return partial_rows * padded_dim(kind.head_dim), partial_rows * 2, work.num_counters * kind.num_kv_heads


@dataclass(frozen=True, slots=True)
class SentWork:
    """The work lists of one step, on the device: WorkLists that the host has planned."""

    cuts: Mapping[LayerKind, ItemCut]
    workspaces: Mapping[LayerKind, Workspace]

    def workspace(self, kind: LayerKind, cut: ItemCut) -> Workspace:
        if self.cuts.get(kind) != cut:
            raise no_list_for(kind, cut, self.cuts)
        return self.workspaces[kind]


def pack_lists(cuts: Mapping[LayerKind, ItemCut], lens: HostLens) -> PackedWork:
    """Plan a step for these kinds of layers. At least one kind."""
    lists = {kind: plan_items(lens.query_starts, lens.kv_lens, cut, lens.places) for kind, cut in cuts.items()}
    parts: list[Numbers] = []
    for work in lists.values():
        header = np.array([len(work.items), work.num_rows, 0, 0], np.int32)
        parts += [header, work.items.reshape(-1), np.zeros(-work.items.size % _ALIGNMENT, np.int32)]
    return PackedWork(np.concatenate(parts), cuts, lists)


def aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _workspace(numbers: Tensor, work: ItemList, kind: LayerKind, scratch: Scratch) -> Workspace:
    return Workspace(
        # At least one program: a step may be padding only.
        num_programs=max(1, len(work.items) * kind.num_kv_heads),
        header=numbers[:2],
        items=numbers[HEADER_SIZE:].view(-1, len(FIELDS)),
        scratch=scratch,
    )
