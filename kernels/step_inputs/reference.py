"""The truth of step preparation: row by row, token by token."""

from collections.abc import Iterator

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
    packed: list[int] = step.tolist()
    for number in range(_header(packed)["num_segments"]):
        record = segments_start(max_rows) + number * len(SEGMENT_FIELDS)
        table, place, first, count, values = packed[record : record + len(SEGMENT_FIELDS)]
        entries = tables.token_ids if table == TOKEN_IDS else tables.block_tables
        for i in range(count):
            entries[place, first + i] = packed[values + i]


def step_inputs(step: Tensor, tables: SequenceTables, inputs: StepInputs, *, block_size: int) -> None:
    for written in (inputs.token_ids, inputs.positions, inputs.kv_lens, inputs.places, inputs.logit_rows):
        written.zero_()
    inputs.slots.fill_(-1)
    inputs.sampled_logits.zero_()
    inputs.sampled_places.fill_(-1)
    inputs.sampled_lens.zero_()
    token = logit = sample = 0
    for r, row in enumerate(_rows(step.tolist(), len(inputs.kv_lens))):
        inputs.query_starts[r] = token
        inputs.kv_lens[r] = row["start"] + row["num_tokens"]
        inputs.places[r] = row["place"]
        for i in range(row["num_prompt_logits"]):
            inputs.logit_rows[logit] = token + i
            logit += 1
        for position in range(row["start"], row["start"] + row["num_tokens"]):
            inputs.token_ids[token] = tables.token_ids[row["place"], position]
            inputs.positions[token] = position
            block = tables.block_tables[row["place"], position // block_size]
            inputs.slots[token] = block * block_size + position % block_size
            token += 1
        if row["sample"] >= 0:
            inputs.logit_rows[logit] = token - 1
            inputs.sampled_logits[sample] = logit
            inputs.sampled_places[sample] = row["place"]
            inputs.sampled_lens[sample] = row["start"] + row["num_tokens"]
            logit += 1
            sample += 1
    inputs.query_starts[_header(step.tolist())["num_rows"] :] = token


def append_token_ids(drawn: Tensor, tables: SequenceTables, inputs: StepInputs) -> None:
    for token_id, place, position in zip(
        drawn.tolist(), inputs.sampled_places.tolist(), inputs.sampled_lens.tolist(), strict=False
    ):
        if place >= 0 and position < tables.token_ids.shape[1]:
            tables.token_ids[place, position] = token_id


def _header(packed: list[int]) -> dict[str, int]:
    return dict(zip(HEADER_FIELDS, packed, strict=False))


def _rows(packed: list[int], max_rows: int) -> Iterator[dict[str, int]]:
    """The rows that are used."""
    for r in range(_header(packed)["num_rows"]):
        yield {name: packed[HEADER_SIZE + f * max_rows + r] for f, name in enumerate(ROW_FIELDS)}
