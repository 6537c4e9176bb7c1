"""Which tokens of a step belong to which sequence and where their context lies. Knows no layer and no values."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from llmd_kernels.paged_attention.work import Cut, TileGroup, plan_work
from llmd_kernels.paged_attention.workspace import WorkLists

T = TypeVar("T")


@dataclass(frozen=True)
class AttentionBatch:
    """The sequences of one step, as attention sees them; built once a step, used by every layer.

    Sequence s owns the query rows query_starts[s] … query_starts[s + 1]; they are its last positions, that is,
    the last of kv_lens[s]. Rows beyond query_starts[-1] are padding. Its token at position p lies in block
    block_tables[s, p // block_size] at offset p % block_size; entries beyond its length are never read.

    With `places`, the tables are those of all live sequences, and sequence s has the row places[s].

    A GPU needs a work list for each kind of layer. It is in `work_lists`: planned by the device (device_work.py), or by
    a host that knows the lengths (host_work.py). Without them the host reads the tensors, and so waits for the device,
    at the first layer of each kind.
    """

    query_starts: Tensor  # [num_seqs + 1] int64, first 0, never falling
    kv_lens: Tensor  # [num_seqs] int64: context of each sequence, this step's tokens included
    block_tables: Tensor  # [num_seqs, or num_places; max_blocks] int64 or int32
    block_size: int  # tokens of a block: a power of two
    places: Tensor | None = None  # [num_seqs] int64
    is_static: bool = False  # the tensors are written anew for every step: nothing that is made from them is kept
    work_lists: WorkLists | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns: made at the first layer that asks for `key`, kept for the others."""
        if self.is_static:
            return make()
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def work(self, cut: Cut) -> list[TileGroup]:
        """The step's attention cut to pieces, for PyTorch's operators."""
        return self.once(cut, lambda: plan_work(self.query_starts, self.kv_lens, self._tables(), cut))

    def _tables(self) -> Tensor:
        """One row a sequence of the batch."""
        return self.block_tables if self.places is None else self.block_tables[self.places]
