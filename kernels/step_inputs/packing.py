"""What the host sends for a step, as one row of 32-bit integers: which rows run, and what is new in the tables.

    header    HEADER_FIELDS, filled up to HEADER_SIZE
    rows      ROW_FIELDS, one field after the other, `max_rows` numbers each
    segments  SEGMENT_FIELDS, one record after the other: where consecutive new entries of a table go
    values    of all segments

Header and rows lie at the same places in every step of a bucket, so a captured launch finds them. Knows no device.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate, chain
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
_ALIGNMENT = 4


class NewEntries(NamedTuple):
    """Consecutive new entries in one sequence's row of a table."""

    table: int  # TOKEN_IDS or BLOCK_TABLES
    place: int
    first: int  # column of the first value
    values: Sequence[int] | npt.NDArray[np.integer]


def segments_start(max_rows: int) -> int:
    return HEADER_SIZE + len(ROW_FIELDS) * max_rows


def pack_step(rows: npt.ArrayLike, new_entries: Sequence[NewEntries], *, max_rows: int, num_before: int = 0) -> Array:
    """A step as it is sent, to a multiple of 16 bytes, behind `num_before` numbers that are the caller's to write.

    rows [num_rows, len(GIVEN_FIELDS)]: place, start, num_tokens ≥ 1, num_prompt_logits, samples (0 or 1); no place
    twice. ValueError where there are more rows than `max_rows`.
    """
    given = np.asarray(rows, dtype=np.int32).reshape(-1, len(GIVEN_FIELDS))
    if len(given) > max_rows:
        raise ValueError(f"{len(given)} rows in a step of at most {max_rows}")
    segments = _segments(new_entries)
    counts = [len(segment.values) for segment in segments]
    values_start = segments_start(max_rows) + len(segments) * len(SEGMENT_FIELDS)
    values_end = values_start + sum(counts)
    packed = np.empty(num_before + -(-values_end // _ALIGNMENT) * _ALIGNMENT, np.int32)
    step = packed[num_before:]
    totals = _pack_rows(given, step[HEADER_SIZE : segments_start(max_rows)].reshape(len(ROW_FIELDS), max_rows))
    step[:HEADER_SIZE] = (len(given), *totals, len(segments), 0, 0, 0)
    if segments:
        tables, places, firsts, values = zip(*segments, strict=True)
        starts = accumulate(counts[:-1], initial=values_start)
        records = zip(tables, places, firsts, counts, starts, strict=True)
        step[segments_start(max_rows) : values_start] = list(chain.from_iterable(records))
        step[values_start:values_end] = list(chain.from_iterable(values))
    step[values_end:] = 0
    return packed


def _pack_rows(given: Array, packed: Array) -> list[int]:
    """given [num_rows, len(GIVEN_FIELDS)] → packed [len(ROW_FIELDS), max_rows]; tokens, logits and samples in all."""
    num_rows, max_rows = len(given), packed.shape[1]
    columns, used = given.T, packed[:, :num_rows]
    used[:4] = columns[:4]
    # compared as bytes: a third of the time of NumPy's comparison
    if columns[2:].tobytes() == _decoding(num_rows):
        used[4:] = np.arange(num_rows)
        totals = [num_rows] * 3
    else:
        # tokens, logits, samples
        counts = columns[2:].copy()
        counts[1] += counts[2]
        ends = counts.cumsum(axis=1)
        used[4:] = ends - counts
        used[6, counts[2] == 0] = -1
        totals = ends[:, -1].tolist()
    if num_rows < max_rows:
        # Rows that are not used have no tokens, and so begin where the last one ends.
        packed[:, num_rows:] = np.array([0, 0, 0, 0, *totals[:2], -1])[:, None]
    return totals


@functools.cache
def _decoding(num_rows: int) -> bytes:
    """num_tokens, num_prompt_logits and samples of rows that run a token and draw the next, as most steps have them."""
    return np.repeat(np.array([1, 0, 1], np.int32), num_rows).tobytes()


def _segments(new_entries: Sequence[NewEntries]) -> list[NewEntries]:
    """The same entries in pieces that one program can write."""
    if all(0 < len(new.values) <= MAX_SEGMENT for new in new_entries):
        return list(new_entries)
    return [
        NewEntries(table, place, first + start, values[start : start + MAX_SEGMENT])
        for table, place, first, values in new_entries
        for start in range(0, len(values), MAX_SEGMENT)
    ]
