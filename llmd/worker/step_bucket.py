"""Steps of a size: memory at fixed addresses, and the launches that work on it.

A graph of these launches serves every step of the size, whatever its contexts. Knows tensors, no plan.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from llmd.model.inputs import ModelInputs
from llmd_kernels import AttentionWork, SequenceTables, StepInputs, allocate_inputs


class StepSize(NamedTuple):
    """What a step has room for. Decode steps have as many tokens as rows."""

    max_rows: int
    max_tokens: int


class StepKind(NamedTuple):
    """What steps have in common that run the same launches."""

    size: StepSize
    draws: bool  # ends with drawn tokens; otherwise with hidden states, for rows that are drawn in other ways


@dataclass(frozen=True, slots=True)
class StepBucket:
    """The memory of the steps of a size."""

    inputs: StepInputs
    model_inputs: ModelInputs
    work_lists: AttentionWork


def allocate_bucket(
    size: StepSize, tables: SequenceTables, work_lists: AttentionWork, *, block_size: int, device: torch.device
) -> StepBucket:
    """Each row has at most one logit."""
    inputs = allocate_inputs(size.max_rows, size.max_tokens, size.max_rows, device=device)
    model_inputs = ModelInputs(
        token_ids=inputs.token_ids,
        positions=inputs.positions,
        slots=inputs.slots,
        attention=inputs.attention(tables, block_size=block_size, work_lists=work_lists),
        logit_rows=inputs.logit_rows,
    )
    return StepBucket(inputs, model_inputs, work_lists)
