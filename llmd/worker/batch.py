"""From the rows of a plan to the tensors of a forward pass. Knows integers and shapes; nothing is computed here."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from llmd.model.inputs import ModelInputs
from llmd.protocol.steps import SequenceStep
from llmd.worker.sequences import SequenceCopy
from llmd_kernels import AttentionBatch

# see ModelInputs: with a multiple of eight rows no library changes its order of summation
_ROW_MULTIPLE = 8

Row = tuple[SequenceStep, SequenceCopy]


@dataclass(frozen=True, slots=True)
class PromptLogits:
    """Which logits of a step tell the log-probabilities of one sequence's prompt tokens."""

    row: int  # index into the plan's sequences
    first_logit: int  # index into the logits; the tokens follow one another
    token_ids: list[int]  # the prompt tokens whose probabilities they give


@dataclass(frozen=True, slots=True)
class Batch:
    """What the runner needs for one step."""

    inputs: ModelInputs
    sampled_rows: list[int]  # indices into the plan's sequences; row i's logits are logits[sampled_logits[i]]
    sampled_logits: list[int]
    prompt_logits: list[PromptLogits]


def build_batch(rows: list[Row], *, block_size: int, device: torch.device) -> Batch:
    """One row of tokens for all sequences, in the plan's order."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    sampled_rows: list[int] = []
    sampled_logits: list[int] = []
    prompt_logits: list[PromptLogits] = []
    for row, (step, copy) in enumerate(rows):
        first_row, end = len(token_ids), step.start + step.num_tokens
        token_ids += copy.token_ids[step.start : end]
        positions += range(step.start, end)
        slots += [copy.block_ids[p // block_size] * block_size + p % block_size for p in range(step.start, end)]
        if copy.num_prompt_logprobs is not None and step.start + 1 < copy.num_prompt_tokens:
            # the logits of a token tell the probability of the one after it
            wanted = copy.token_ids[step.start + 1 : min(end + 1, copy.num_prompt_tokens)]
            prompt_logits.append(PromptLogits(row=row, first_logit=len(logit_rows), token_ids=wanted))
            logit_rows += range(first_row, first_row + len(wanted))
        if step.samples:
            sampled_rows.append(row)
            sampled_logits.append(len(logit_rows))
            logit_rows.append(len(token_ids) - 1)

    padding = -len(token_ids) % _ROW_MULTIPLE
    token_ids += [0] * padding
    positions += [0] * padding
    slots += [-1] * padding
    attention = AttentionBatch(
        query_starts=_tensor([0, *accumulate(step.num_tokens for step, _ in rows)], device),
        kv_lens=_tensor([step.start + step.num_tokens for step, _ in rows], device),
        block_tables=_block_tables([copy.block_ids for _, copy in rows], device),
        block_size=block_size,
    )
    inputs = ModelInputs(
        token_ids=_tensor(token_ids, device),
        positions=_tensor(positions, device),
        slots=_tensor(slots, device),
        attention=attention,
        logit_rows=_tensor(logit_rows, device),
    )
    return Batch(inputs, sampled_rows, sampled_logits, prompt_logits)


def _tensor(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _block_tables(tables: list[list[int]], device: torch.device) -> Tensor:
    width = max(map(len, tables))
    return _tensor([block for table in tables for block in (*table, *[0] * (width - len(table)))], device).view(
        len(tables), width
    )
