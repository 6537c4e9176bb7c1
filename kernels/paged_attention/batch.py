"""Which tokens of a step belong to which sequence and where their context lies. Knows no layer and no values."""

from dataclasses import dataclass, field

from torch import Tensor

from llmd_kernels.paged_attention.work import Cut, TileGroup, plan_work


@dataclass(frozen=True)
class AttentionBatch:
    """The sequences of one step, as attention sees them; built once a step, used by every layer.

    Sequence s owns the query rows query_starts[s] … query_starts[s + 1]; they are its last positions, that is,
    the last of kv_lens[s]. Rows beyond query_starts[-1] are padding. Its token at position p lies in block
    block_tables[s, p // block_size] at offset p % block_size; entries beyond its length are never read.
    """

    query_starts: Tensor  # [num_seqs + 1] int64, first 0, never falling
    kv_lens: Tensor  # [num_seqs] int64: context of each sequence, this step's tokens included
    block_tables: Tensor  # [num_seqs, max_blocks] int64
    block_size: int  # tokens of a block: a power of two
    _work: dict[Cut, list[TileGroup]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def work(self, cut: Cut) -> list[TileGroup]:
        """The step's attention cut to pieces: worked out at the first layer that asks, kept for the others."""
        if cut not in self._work:
            self._work[cut] = plan_work(self.query_starts, self.kv_lens, self.block_tables, cut)
        return self._work[cut]
