"""Step preparation with PyTorch's operators. Shapes do not depend on the step, so nothing is read back.

`write_differences` is the exception: it copies segment by segment, and must know how many there are.
"""

import torch
from torch import Tensor

from llmd_kernels.step_inputs.buffers import SequenceTables, StepInputs
from llmd_kernels.step_inputs.packing import (
    HEADER_FIELDS,
    HEADER_SIZE,
    ROW_FIELDS,
    SEGMENT_FIELDS,
    TOKEN_IDS,
    segments_start,
)


def write_differences(step: Tensor, tables: SequenceTables, *, max_rows: int) -> None:
    num_segments = int(step[HEADER_FIELDS.index("num_segments")])
    start = segments_start(max_rows)
    records = step[start : start + num_segments * len(SEGMENT_FIELDS)].view(-1, len(SEGMENT_FIELDS))
    for table, place, first, count, values in records.tolist():
        entries = tables.token_ids if table == TOKEN_IDS else tables.block_tables
        entries[place, first : first + count] = step[values : values + count]


def step_inputs(step: Tensor, tables: SequenceTables, inputs: StepInputs, *, block_size: int) -> None:
    max_rows = len(inputs.kv_lens)
    header = dict(zip(HEADER_FIELDS, step.long().unbind(), strict=False))
    packed_rows = step[HEADER_SIZE : segments_start(max_rows)].view(len(ROW_FIELDS), max_rows).long()
    rows = dict(zip(ROW_FIELDS, packed_rows, strict=True))
    ends = rows["start"] + rows["num_tokens"]

    tokens = torch.arange(len(inputs.token_ids), device=step.device)
    is_used = tokens < header["num_tokens"]
    row = _row_of(tokens, rows["first_token"])
    # Padding reads a place that exists.
    place = rows["place"][row]
    positions = torch.where(is_used, rows["start"][row] + tokens - rows["first_token"][row], 0)
    slots = tables.block_tables[place, positions // block_size].long() * block_size + positions % block_size
    inputs.positions.copy_(positions)
    inputs.token_ids.copy_(torch.where(is_used, tables.token_ids[place, positions], 0))
    inputs.slots.copy_(torch.where(is_used, slots, -1))

    inputs.query_starts[:-1] = rows["first_token"]
    inputs.query_starts[-1:] = header["num_tokens"]
    inputs.kv_lens.copy_(ends)
    inputs.places.copy_(rows["place"])

    logits = torch.arange(len(inputs.logit_rows), device=step.device)
    row = _row_of(logits, rows["first_logit"])
    within = logits - rows["first_logit"][row]
    is_prompt = within < rows["num_prompt_logits"][row]
    wanted = rows["first_token"][row] + torch.where(is_prompt, within, rows["num_tokens"][row] - 1)
    inputs.logit_rows.copy_(torch.where(logits < header["num_logits"], wanted, 0))

    # Rows that draw nothing write behind the end.
    sample = torch.where(rows["sample"] < 0, max_rows, rows["sample"])
    for written, values, empty in (
        (inputs.sampled_logits, rows["first_logit"] + rows["num_prompt_logits"], 0),
        (inputs.sampled_places, rows["place"], -1),
        (inputs.sampled_lens, ends, 0),
    ):
        written.copy_(values.new_full((max_rows + 1,), empty).scatter_(0, sample, values)[:-1])


def append_token_ids(drawn: Tensor, tables: SequenceTables, inputs: StepInputs) -> None:
    places, positions = inputs.sampled_places[: len(drawn)], inputs.sampled_lens[: len(drawn)]
    is_kept = (places >= 0) & (positions < tables.token_ids.shape[1])
    # The others write what is there already to the first entry, which no drawn token can be.
    places, positions = places * is_kept, positions * is_kept
    tables.token_ids[places, positions] = torch.where(is_kept, drawn.int(), tables.token_ids[0, 0])


def _row_of(numbers: Tensor, firsts: Tensor) -> Tensor:
    """The row in which each number lies, of rows that begin at `firsts`, never falling; of equal ones the last."""
    return torch.searchsorted(firsts.contiguous(), numbers, right=True).sub_(1).clamp_(min=0)
