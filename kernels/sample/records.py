"""The parameters of live sequences as the device has them, in words: made once a sequence, packed at each of its steps.

Knows no tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmd_kernels.sample.batch import RowSampling

Words = npt.NDArray[np.int32]
Indices = npt.NDArray[np.integer]
# Token ids, and what is added to their logits (the bits of float32).
Biases = tuple[Words, Words]

# Words of a row that do not change while its sequence lives, in the order of a packed buffer, beside the seed.
SEQUENCE_FIELDS = (
    "choice",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "prompt_len",
    "place",
)
# Bits of a row's flags: top_k, top_p or min_p; bitmask, biases or penalties; penalties.
FILTERS, ADJUSTS, PENALIZES = 1, 2, 4


@dataclass(frozen=True, slots=True)
class RowRecord:
    """A RowSampling in words."""

    seed: int  # the signed view of 64 bits
    numbers: Words  # the first SEQUENCE_FIELDS
    # Before `min_tokens` output tokens, then from there on.
    early_biases: Biases
    biases: Biases
    min_tokens: int
    filters: bool
    penalizes: bool

    def flags(self, biases: Biases) -> int:
        """FILTERS, ADJUSTS and PENALIZES of a row with these biases."""
        adjusts = self.penalizes or len(biases[0]) > 0
        return FILTERS * self.filters | ADJUSTS * adjusts | PENALIZES * self.penalizes


def record_of(row: RowSampling) -> RowRecord:
    """The row's parameters in float32, as the device has them."""
    floats = np.array(
        [
            row.temperature,
            row.top_p,
            row.min_p,
            row.repetition_penalty,
            row.presence_penalty,
            row.frequency_penalty,
        ],
        np.float32,
    ).view(np.int32)
    choice = np.array([row.choice], np.uint32).view(np.int32)
    filters = row.temperature > 0 and (row.top_k > 0 or row.top_p < 1 or row.min_p > 0)
    penalties = (row.repetition_penalty, row.presence_penalty, row.frequency_penalty)
    return RowRecord(
        seed=int(np.uint64(row.seed).view(np.int64)),
        numbers=np.concatenate((choice, floats[:1], np.array([row.top_k], np.int32), floats[1:])),
        early_biases=_bias_words({**row.logit_bias, **dict.fromkeys(row.stop_token_ids, float("-inf"))}),
        biases=_bias_words(row.logit_bias),
        min_tokens=row.min_tokens,
        filters=filters,
        penalizes=penalties != (1, 0, 0),
    )


class SamplingRecords:
    """A column a sequence, so that a step takes those of its rows and builds nothing a row."""

    def __init__(self, num_columns: int) -> None:
        self.seeds = np.zeros(num_columns, np.int64)
        self.numbers = np.zeros((len(SEQUENCE_FIELDS), num_columns), np.int32)
        self._min_tokens = np.zeros(num_columns, np.int32)
        # two for each column: from `min_tokens` output tokens on, and before
        self._flags = np.zeros(2 * num_columns, np.int32)
        self._records: list[RowRecord | None] = [None] * num_columns
        self._asking: set[int] = set()  # columns that ever have flags

    @staticmethod
    def of(rows: Sequence[RowSampling], *, prompt_lens: Sequence[int], places: Sequence[int]) -> "SamplingRecords":
        """A column each, in order."""
        records = SamplingRecords(len(rows))
        for column, (row, prompt_len, place) in enumerate(zip(rows, prompt_lens, places, strict=True)):
            records.put(column, row, prompt_len=prompt_len, place=place)
        return records

    def put(self, column: int, row: RowSampling, *, prompt_len: int, place: int) -> None:
        """From now on the column is that of a sequence whose tokens stand at `place` of the history."""
        record = record_of(row)
        self.seeds[column] = record.seed
        self.numbers[:, column] = (*record.numbers, prompt_len, place)
        # no sequence is longer than that; a request may ask for more
        self._min_tokens[column] = min(record.min_tokens, np.iinfo(np.int32).max)
        self._flags[2 * column] = record.flags(record.biases)
        self._flags[2 * column + 1] = record.flags(record.early_biases)
        self._records[column] = record
        if self._flags[2 * column] or (record.min_tokens and self._flags[2 * column + 1]):
            self._asking.add(column)
        else:
            self._asking.discard(column)

    def drop(self, column: int) -> None:
        """Its sequence has ended: no step will ask for the column until another is put there."""
        self._asking.discard(column)

    @property
    def asks_nothing(self) -> bool:
        """Whether all sequences have no flags in any step."""
        return not self._asking

    def flags(self, columns: Indices, positions: Words) -> Words:
        """Of rows that draw the output tokens `positions`."""
        early = positions < self._min_tokens.take(columns)
        return self._flags.take(2 * columns + early)

    def biases(self, columns: Indices, positions: Words) -> list[Biases]:
        """The same rows' biases."""
        found = []
        for column, position in zip(columns.tolist(), positions.tolist(), strict=True):
            record = self._records[column]
            assert record is not None
            found.append(record.early_biases if position < record.min_tokens else record.biases)
        return found


def _bias_words(biases: Mapping[int, float]) -> Biases:
    return np.array(list(biases), np.int32), np.array(list(biases.values()), np.float32).view(np.int32)
