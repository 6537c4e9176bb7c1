"""The tensors on the device that step preparation reads and writes. They stay; their contents change with each step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmd_kernels.paged_attention.batch import AttentionBatch
from llmd_kernels.paged_attention.device_work import AttentionWork


@dataclass(frozen=True, slots=True)
class SequenceTables:
    """What the device knows of the live sequences: one row ("place") each. The host says who has which place."""

    token_ids: Tensor  # [num_places, max_len] int32: prompt and output so far
    block_tables: Tensor  # [num_places, max_blocks] int32


def allocate_tables(num_places: int, max_len: int, *, block_size: int, device: torch.device) -> SequenceTables:
    """max_len: tokens of a sequence, at most."""
    return SequenceTables(
        token_ids=torch.zeros(num_places, max_len, dtype=torch.int32, device=device),
        block_tables=torch.zeros(num_places, -(-max_len // block_size), dtype=torch.int32, device=device),
    )


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the model and the sampler read in one step; a bucket's launches always find it at the same addresses."""

    token_ids: Tensor  # [max_tokens] int64; 0 in padding
    positions: Tensor  # [max_tokens] int64; 0 in padding
    slots: Tensor  # [max_tokens] int64: where each token's K and V go; -1 in padding: nowhere
    query_starts: Tensor  # [max_rows + 1] int64: as in AttentionBatch; rows that are not used have no tokens
    kv_lens: Tensor  # [max_rows] int64; 0 in rows that are not used
    places: Tensor  # [max_rows] int64: each row's place in the tables; 0 in rows that are not used
    logit_rows: Tensor  # [max_logits] int64: tokens whose logits are wanted; 0 behind the last
    sampled_logits: Tensor  # [max_rows] int64: which logits each drawn token is drawn from; 0 behind the last
    sampled_places: Tensor  # [max_rows] int64: the place of each drawn token's sequence; -1 behind the last
    sampled_lens: Tensor  # [max_rows] int64: the tokens that it had: the drawn one's position; 0 behind the last

    def attention(
        self, tables: SequenceTables, *, block_size: int, work_lists: AttentionWork | None = None
    ) -> AttentionBatch:
        """The batch for `paged_attention`, over these tensors: make it once, it serves every step."""
        return AttentionBatch(
            self.query_starts,
            self.kv_lens,
            tables.block_tables,
            block_size,
            places=self.places,
            is_static=True,
            work_lists=work_lists,
        )


def allocate_inputs(max_rows: int, max_tokens: int, max_logits: int, *, device: torch.device) -> StepInputs:
    """For steps of at most so many sequences, tokens (padding included) and logits."""

    def zeros(size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64, device=device)

    return StepInputs(
        token_ids=zeros(max_tokens),
        positions=zeros(max_tokens),
        slots=zeros(max_tokens),
        query_starts=zeros(max_rows + 1),
        kv_lens=zeros(max_rows),
        places=zeros(max_rows),
        logit_rows=zeros(max_logits),
        sampled_logits=zeros(max_rows),
        sampled_places=zeros(max_rows) - 1,
        sampled_lens=zeros(max_rows),
    )
