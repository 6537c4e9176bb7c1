"""What the host sends for a step, as one row of 32-bit integers: which rows run, and what is new in the tables.

    header    HEADER_FIELDS, filled up to HEADER_SIZE
    rows      ROW_FIELDS, one field after the other, `max_rows` numbers each
    segments  SEGMENT_FIELDS, one record after the other: where consecutive new entries of a table go
    values    of all segments

Header and rows lie at the same places in every step of a bucket, so a captured launch finds them. Knows no device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int32]

HEADER_FIELDS = ("num_rows", "num_tokens", "num_logits", "num_samples", "num_segments")
HEADER_SIZE = 8
# The columns of `rows` as the caller gives them.
GIVEN_FIELDS = ("place", "start", "num_tokens", "num_prompt_logits", "samples")
ROW_FIELDS = (
    "place",  # the sequence's row of the tables
    "start",  # position of the first token that runs
    "num_tokens",  # that run
    "num_prompt_logits",  # of its first tokens, for the probabilities of prompt tokens
    "first_token",  # where its tokens begin in the step's row of tokens
    "first_logit",  # where the logits of this row begin
    "sample",  # which of the drawn tokens is this row's; -1: none
)
SEGMENT_FIELDS = ("table", "place", "first", "count", "values")
# What "table" says.
TOKEN_IDS, BLOCK_TABLES = 0, 1
# A program writes one segment at a time; longer runs of new entries are several segments.
MAX_SEGMENT = 1024


class NewEntries(NamedTuple):
    """Consecutive new entries in one sequence's row of a table."""

    table: int  # TOKEN_IDS or BLOCK_TABLES
    place: int
    first: int  # column of the first value
    values: Sequence[int] | npt.NDArray[np.integer]


def segments_start(max_rows: int) -> int:
    return HEADER_SIZE + len(ROW_FIELDS) * max_rows


def packed_size(max_rows: int, new_entries: Sequence[NewEntries]) -> int:
    """Numbers that `pack_step` writes."""
    sizes = [len(new.values) for new in new_entries]
    num_segments = sum(-(-size // MAX_SEGMENT) for size in sizes)
    return segments_start(max_rows) + num_segments * len(SEGMENT_FIELDS) + sum(sizes)


def pack_step(rows: npt.ArrayLike, new_entries: Sequence[NewEntries], out: Array, *, max_rows: int) -> int:
    """Write a step to `out` (as a rule pinned memory); returns how many numbers of it are used.

    rows [num_rows, len(GIVEN_FIELDS)]: place, start, num_tokens ≥ 1, num_prompt_logits, samples (0 or 1); no place
    twice. ValueError where there are more rows than `max_rows`, or more numbers than `out` has room for.
    """
    given = np.asarray(rows, dtype=np.int32).reshape(-1, len(GIVEN_FIELDS))
    size = packed_size(max_rows, new_entries)
    if len(given) > max_rows:
        raise ValueError(f"{len(given)} rows in a step of at most {max_rows}")
    if size > len(out):
        raise ValueError(f"the step takes {size} numbers, the buffer has {len(out)}: make it larger")
    packed_rows = out[HEADER_SIZE : segments_start(max_rows)].reshape(len(ROW_FIELDS), max_rows)
    used, unused = packed_rows[:, : len(given)], packed_rows[:, len(given) :]
    used[:4] = given.T[:4]
    # tokens, logits, samples
    counts = given.T[2:].copy()
    counts[1] += counts[2]
    ends = counts.cumsum(axis=1, dtype=np.int32)
    np.subtract(ends, counts, out=used[4:])
    totals = ends[:, -1].tolist() if len(given) else (0, 0, 0)
    if totals[2] < len(given):
        used[6, counts[2] == 0] = -1
    # Rows that are not used have no tokens, and so begin where the last one ends.
    unused[:] = np.array([0, 0, 0, 0, totals[0], totals[1], -1])[:, None]
    num_segments = _pack_entries(new_entries, out, segments_start(max_rows), size)
    out[:HEADER_SIZE] = (len(given), *totals, num_segments, 0, 0, 0)
    return size


def _pack_entries(new_entries: Sequence[NewEntries], out: Array, start: int, end: int) -> int:
    """Segments from `start` on, their values up to `end`; returns the number of segments."""
    segments: list[int] = []
    values: list[int] = []
    for table, place, first_column, new_values in new_entries:
        for first in range(0, len(new_values), MAX_SEGMENT):
            count = min(MAX_SEGMENT, len(new_values) - first)
            segments += (table, place, first_column + first, count, len(values) + first)
        values.extend(new_values)
    values_start = end - len(values)
    records = out[start:values_start].reshape(-1, len(SEGMENT_FIELDS))
    records[:] = np.array(segments, np.int32).reshape(-1, len(SEGMENT_FIELDS))
    records[:, -1] += values_start
    out[values_start:end] = values
    return len(records)
