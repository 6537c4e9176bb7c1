"""Decode steps of one to so many rows, one token each: memory at fixed addresses, and the launches that work on it.

A graph of these launches serves every step of the bucket, whatever its contexts. Knows tensors, no plan.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from llmd.model.inputs import ModelInputs
from llmd_kernels import AttentionWork, SequenceTables, StepInputs, allocate_inputs


class DecodeKind(NamedTuple):
    """What decode steps have in common that run the same launches."""

    max_rows: int
    draws: bool  # ends with drawn tokens; otherwise with hidden states, for rows that are drawn in other ways


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """The memory of the decode steps of a size."""

    inputs: StepInputs
    model_inputs: ModelInputs
    work_lists: AttentionWork


def allocate_bucket(
    size: int, tables: SequenceTables, work_lists: AttentionWork, *, block_size: int, device: torch.device
) -> DecodeBucket:
    inputs = allocate_inputs(size, size, size, device=device)
    model_inputs = ModelInputs(
        token_ids=inputs.token_ids,
        positions=inputs.positions,
        slots=inputs.slots,
        attention=inputs.attention(tables, block_size=block_size, work_lists=work_lists),
        logit_rows=inputs.logit_rows,
    )
    return DecodeBucket(inputs, model_inputs, work_lists)
