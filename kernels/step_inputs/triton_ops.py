"""Step preparation in Triton: each a small launch whose grid depends on the bucket alone. Integers only."""

import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.paged_attention.plan_kernel import last_at_most
from llmd_kernels.step_inputs.buffers import SequenceTables, StepInputs
from llmd_kernels.step_inputs.packing import (
    HEADER_FIELDS,
    HEADER_SIZE,
    MAX_SEGMENT,
    ROW_FIELDS,
    SEGMENT_FIELDS,
    TOKEN_IDS,
    segments_start,
)

# Tokens, rows or logits of a program: one a thread.
BLOCK = 128
NUM_WARPS = 4
# Programs that share the segments of new entries. A step has few, except where long prompts begin.
SEGMENT_PROGRAMS = 32

# What the kernels read of the layout.
NUM_TOKENS = tl.constexpr(HEADER_FIELDS.index("num_tokens"))
NUM_LOGITS = tl.constexpr(HEADER_FIELDS.index("num_logits"))
NUM_SAMPLES = tl.constexpr(HEADER_FIELDS.index("num_samples"))
NUM_SEGMENTS = tl.constexpr(HEADER_FIELDS.index("num_segments"))
FIRST_ROW = tl.constexpr(HEADER_SIZE)
PLACE = tl.constexpr(ROW_FIELDS.index("place"))
START = tl.constexpr(ROW_FIELDS.index("start"))
NUM_ROW_TOKENS = tl.constexpr(ROW_FIELDS.index("num_tokens"))
FIRST_TOKEN = tl.constexpr(ROW_FIELDS.index("first_token"))
NUM_PROMPT_LOGITS = tl.constexpr(ROW_FIELDS.index("num_prompt_logits"))
FIRST_LOGIT = tl.constexpr(ROW_FIELDS.index("first_logit"))
SAMPLE = tl.constexpr(ROW_FIELDS.index("sample"))
SEGMENT_SIZE = tl.constexpr(len(SEGMENT_FIELDS))
TOKEN_IDS_TABLE = tl.constexpr(TOKEN_IDS)


def write_differences(step: Tensor, tables: SequenceTables, *, max_rows: int) -> None:
    write_differences_kernel[(SEGMENT_PROGRAMS,)](
        step,
        tables.token_ids,
        tables.block_tables,
        segments_start(max_rows),
        tables.token_ids.stride(0),
        tables.block_tables.stride(0),
        BLOCK=MAX_SEGMENT,
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize=["segments_start", "token_ids_stride", "block_tables_stride"])
def write_differences_kernel(
    step, token_ids, block_tables, segments_start, token_ids_stride, block_tables_stride, BLOCK: tl.constexpr
):
    """Program p writes the segments p, p + programs, …: no two write the same entries."""
    columns = tl.arange(0, BLOCK)
    for number in range(tl.program_id(0), tl.load(step + NUM_SEGMENTS), tl.num_programs(0)):
        segment = step + segments_start + number * SEGMENT_SIZE
        place = tl.load(segment + 1).to(tl.int64)
        first = tl.load(segment + 2)
        mask = columns < tl.load(segment + 3)
        values = tl.load(step + tl.load(segment + 4) + columns, mask=mask)
        if tl.load(segment) == TOKEN_IDS_TABLE:
            tl.store(token_ids + place * token_ids_stride + first + columns, values, mask=mask)
        else:
            tl.store(block_tables + place * block_tables_stride + first + columns, values, mask=mask)


def step_inputs(step: Tensor, tables: SequenceTables, inputs: StepInputs, *, block_size: int) -> None:
    max_rows, max_tokens, max_logits = len(inputs.kv_lens), len(inputs.token_ids), len(inputs.logit_rows)
    parts = [triton.cdiv(size, BLOCK) for size in (max_tokens, max_rows + 1, max_logits)]
    step_inputs_kernel[(sum(parts),)](
        step,
        tables.token_ids,
        tables.block_tables,
        inputs.token_ids,
        inputs.positions,
        inputs.slots,
        inputs.query_starts,
        inputs.kv_lens,
        inputs.places,
        inputs.logit_rows,
        inputs.sampled_logits,
        inputs.sampled_places,
        inputs.sampled_lens,
        max_rows,
        max_tokens,
        max_logits,
        parts[0],
        parts[1],
        tables.token_ids.stride(0),
        tables.block_tables.stride(0),
        PAGE=block_size,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


@triton.jit(
    do_not_specialize=[
        "max_rows",
        "max_tokens",
        "max_logits",
        "token_programs",
        "row_programs",
        "token_stride",
        "block_stride",
    ]
)
def step_inputs_kernel(
    step, token_table, block_tables, token_ids, positions, slots, query_starts, kv_lens, places,
    logit_rows, sampled_logits, sampled_places, sampled_lens,
    max_rows, max_tokens, max_logits, token_programs, row_programs, token_stride, block_stride,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first programs make tokens, the next ones rows, the last ones logits; all from the packed rows."""
    program = tl.program_id(0)
    rows = step + FIRST_ROW
    number = tl.arange(0, BLOCK)
    if program < token_programs:
        token = program * BLOCK + number
        _make_tokens(
            step, rows, token, token_table, block_tables, token_ids, positions, slots,
            max_rows, max_tokens, token_stride, block_stride, PAGE,
        )  # fmt: skip
    elif program < token_programs + row_programs:
        row = (program - token_programs) * BLOCK + number
        _make_rows(
            step, rows, row, query_starts, kv_lens, places, sampled_logits, sampled_places, sampled_lens, max_rows
        )
    else:
        logit = (program - token_programs - row_programs) * BLOCK + number
        _make_logits(step, rows, logit, logit_rows, max_rows, max_logits)


@triton.jit
def _make_tokens(
    step, rows, token, token_table, block_tables, token_ids, positions, slots,
    max_rows, max_tokens, token_stride, block_stride, PAGE: tl.constexpr,
):  # fmt: skip
    is_used = token < tl.load(step + NUM_TOKENS)
    exists = token < max_tokens
    row = last_at_most(rows + FIRST_TOKEN * max_rows, max_rows, token)
    place = tl.load(rows + PLACE * max_rows + row, mask=is_used, other=0).to(tl.int64)
    first = tl.load(rows + FIRST_TOKEN * max_rows + row, mask=is_used, other=0)
    position = tl.load(rows + START * max_rows + row, mask=is_used, other=0) + token - first
    token_id = tl.load(token_table + place * token_stride + position, mask=is_used, other=0)
    block = tl.load(block_tables + place * block_stride + position // PAGE, mask=is_used, other=0).to(tl.int64)
    tl.store(token_ids + token, token_id.to(tl.int64), mask=exists)
    tl.store(positions + token, tl.where(is_used, position, 0).to(tl.int64), mask=exists)
    tl.store(slots + token, tl.where(is_used, block * PAGE + position % PAGE, -1), mask=exists)


@triton.jit
def _make_rows(step, rows, row, query_starts, kv_lens, places, sampled_logits, sampled_places, sampled_lens, max_rows):
    exists = row < max_rows
    # One start more than rows: where the last one ends.
    first_token = tl.load(rows + FIRST_TOKEN * max_rows + row, mask=exists, other=0)
    first_token = tl.where(exists, first_token, tl.load(step + NUM_TOKENS))
    tl.store(query_starts + row, first_token.to(tl.int64), mask=row <= max_rows)
    place = tl.load(rows + PLACE * max_rows + row, mask=exists, other=0).to(tl.int64)
    num_tokens = tl.load(rows + NUM_ROW_TOKENS * max_rows + row, mask=exists, other=0)
    kv_len = (tl.load(rows + START * max_rows + row, mask=exists, other=0) + num_tokens).to(tl.int64)
    tl.store(places + row, place, mask=exists)
    tl.store(kv_lens + row, kv_len, mask=exists)

    sample = tl.load(rows + SAMPLE * max_rows + row, mask=exists, other=-1)
    draws = sample >= 0
    logit = tl.load(rows + FIRST_LOGIT * max_rows + row, mask=draws, other=0)
    logit += tl.load(rows + NUM_PROMPT_LOGITS * max_rows + row, mask=draws, other=0)
    tl.store(sampled_logits + sample, logit.to(tl.int64), mask=draws)
    tl.store(sampled_places + sample, place, mask=draws)
    tl.store(sampled_lens + sample, kv_len, mask=draws)
    # Behind the samples nobody else writes.
    is_behind = exists & (row >= tl.load(step + NUM_SAMPLES))
    zero = tl.zeros(row.shape, tl.int64)
    tl.store(sampled_logits + row, zero, mask=is_behind)
    tl.store(sampled_places + row, zero - 1, mask=is_behind)
    tl.store(sampled_lens + row, zero, mask=is_behind)


@triton.jit
def _make_logits(step, rows, logit, logit_rows, max_rows, max_logits):
    is_used = logit < tl.load(step + NUM_LOGITS)
    row = last_at_most(rows + FIRST_LOGIT * max_rows, max_rows, logit)
    within = logit - tl.load(rows + FIRST_LOGIT * max_rows + row, mask=is_used, other=0)
    is_prompt = within < tl.load(rows + NUM_PROMPT_LOGITS * max_rows + row, mask=is_used, other=0)
    last = tl.load(rows + NUM_ROW_TOKENS * max_rows + row, mask=is_used, other=0) - 1
    first_token = tl.load(rows + FIRST_TOKEN * max_rows + row, mask=is_used, other=0)
    wanted = tl.where(is_used, first_token + tl.where(is_prompt, within, last), 0)
    tl.store(logit_rows + logit, wanted.to(tl.int64), mask=logit < max_logits)


def append_token_ids(drawn: Tensor, tables: SequenceTables, inputs: StepInputs) -> None:
    if len(drawn):
        append_token_ids_kernel[(triton.cdiv(len(drawn), BLOCK),)](
            drawn.contiguous(),
            tables.token_ids,
            inputs.sampled_places,
            inputs.sampled_lens,
            len(drawn),
            tables.token_ids.shape[1],
            tables.token_ids.stride(0),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )


@triton.jit(do_not_specialize=["num_drawn", "max_len", "token_stride"])
def append_token_ids_kernel(
    drawn, token_ids, sampled_places, sampled_lens, num_drawn, max_len, token_stride, BLOCK: tl.constexpr
):
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = sample < num_drawn
    place = tl.load(sampled_places + sample, mask=exists, other=-1)
    position = tl.load(sampled_lens + sample, mask=exists, other=0)
    token_id = tl.load(drawn + sample, mask=exists, other=0).to(tl.int32)
    tl.store(token_ids + place * token_stride + position, token_id, mask=(place >= 0) & (position < max_len))
