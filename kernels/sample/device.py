"""How rows are to be drawn, as tensors on a device: packed by the host into one buffer of words, one copy a step.

Knows no kernel. The host need not know which tokens were drawn: only how many each sequence has.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmd_kernels.sample.batch import RowSampling
from llmd_kernels.sample.records import ADJUSTS, FILTERS, SEQUENCE_FIELDS, SamplingRecords, Words, record_of

# Words of a row that change at each step.
STEP_FIELDS = ("position", "bitmask_row", "flags")
NUM_ROW_WORDS = 2 + len(SEQUENCE_FIELDS) + len(STEP_FIELDS)


@dataclass(frozen=True, slots=True)
class DeviceSampling:
    """R rows; made by `PackedSampling.on_device`.

    A draw's noise depends on seed, choice, position and token id. `filters` and `adjusts` spare launches: False says
    that no row has that flag.
    """

    seeds: Tensor  # [R] int64: the signed view of 64 bits
    choices: Tensor  # [R] int32: the signed view of 32 bits
    temperatures: Tensor  # [R] float32; 0 = the most likely token
    top_ks: Tensor  # [R] int32; 0 = off
    top_ps: Tensor  # [R] float32; 1 = off
    min_ps: Tensor  # [R] float32; 0 = off
    repetition_penalties: Tensor  # [R] float32; 1 = off
    presence_penalties: Tensor  # [R] float32; 0 = off
    frequency_penalties: Tensor  # [R] float32; 0 = off
    positions: Tensor  # [R] int32: which output token is drawn, from 0
    prompt_lens: Tensor  # [R] int32
    # A sequence's tokens are history[place, : prompt_len + position].
    places: Tensor  # [R] int32
    history: Tensor  # [num_places, max_len] int32
    # Row r's are bias_starts[r] to bias_starts[r + 1]; each token id at most once a row; -inf bans.
    bias_starts: Tensor  # [R + 1] int32
    bias_ids: Tensor  # [B] int32
    biases: Tensor  # [B] float32: added to the logit
    # Bit (id mod 32) of word (id div 32) of the row's row tells whether a token may be drawn; -1: all may.
    bitmask_rows: Tensor  # [R] int32
    bitmask: Tensor | None  # [M, ceil(V / 32)] int32
    flags: Tensor  # [R] int32: FILTERS, ADJUSTS, PENALIZES
    filters: bool
    adjusts: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a buffer begin, in words; the seeds do at 0.

    Each column begins at a multiple of 16 bytes, whatever the number of rows: Triton compiles anew for other addresses.
    """

    numbers: int
    bias_starts: int
    bias_ids: int
    biases: int
    num_words: int

    @staticmethod
    def of(num_rows: int, num_biases: int) -> "Layout":
        column = _aligned(num_rows)
        bias_starts = NUM_ROW_WORDS * column
        bias_ids = bias_starts + _aligned(num_rows + 1)
        biases = bias_ids + _aligned(num_biases)
        return Layout(2 * column, bias_starts, bias_ids, biases, biases + num_biases)


def _aligned(num_words: int) -> int:
    return -(-num_words // 4) * 4


@dataclass(frozen=True, slots=True)
class PackedSampling:
    """The rows of one step in one buffer on the host."""

    words: Words
    num_rows: int
    num_biases: int
    filters: bool
    adjusts: bool

    def on_device(self, words: Tensor, *, history: Tensor, bitmask: Tensor | None = None) -> DeviceSampling:
        """words: int32, a copy of the buffer on the device (its start must be a multiple of 8 bytes). No copies."""
        num_rows, num_biases = self.num_rows, self.num_biases
        layout = Layout.of(num_rows, num_biases)
        numbers = words[layout.numbers : layout.bias_starts].view(NUM_ROW_WORDS - 2, -1)[:, :num_rows]
        column = dict(zip((*SEQUENCE_FIELDS, *STEP_FIELDS), numbers, strict=True))
        return DeviceSampling(
            seeds=words[: 2 * num_rows].view(torch.int64),
            choices=column["choice"],
            temperatures=column["temperature"].view(torch.float32),
            top_ks=column["top_k"],
            top_ps=column["top_p"].view(torch.float32),
            min_ps=column["min_p"].view(torch.float32),
            repetition_penalties=column["repetition_penalty"].view(torch.float32),
            presence_penalties=column["presence_penalty"].view(torch.float32),
            frequency_penalties=column["frequency_penalty"].view(torch.float32),
            positions=column["position"],
            prompt_lens=column["prompt_len"],
            places=column["place"],
            history=history,
            bias_starts=words[layout.bias_starts :][: num_rows + 1],
            bias_ids=words[layout.bias_ids :][:num_biases],
            biases=words[layout.biases :][:num_biases].view(torch.float32),
            bitmask_rows=column["bitmask_row"],
            bitmask=bitmask,
            flags=column["flags"],
            filters=self.filters,
            adjusts=self.adjusts,
        )


def pack_sampling(
    records: SamplingRecords,
    *,
    columns: npt.ArrayLike,
    positions: npt.ArrayLike,
    bitmask_rows: npt.ArrayLike | None = None,
    num_rows: int | None = None,
    num_biases: int | None = None,
) -> PackedSampling:
    """One entry a row each; columns: which records are theirs, positions: which output token each draws, from 0.

    `num_rows` and `num_biases` are sizes to fill up to, for buffers that do not change. Rows that fill up are greedy
    and ask for nothing. ValueError if a size is too small.
    """
    columns, positions = np.asarray(columns, np.intp), np.asarray(positions, np.int32)
    flags = records.flags(columns, positions)
    biases = records.biases(columns, positions) if (flags & ADJUSTS).any() else []
    used_rows, used_biases = len(columns), sum(len(ids) for ids, _ in biases)
    num_rows = used_rows if num_rows is None else num_rows
    num_biases = used_biases if num_biases is None else num_biases
    if used_rows > num_rows or used_biases > num_biases:
        raise ValueError(f"{used_rows} rows with {used_biases} biases do not fit {num_rows} and {num_biases}")
    if bitmask_rows is not None:
        flags |= np.where(np.asarray(bitmask_rows) >= 0, ADJUSTS, 0).astype(np.int32)
    layout = Layout.of(num_rows, num_biases)
    words = np.zeros(layout.num_words, np.int32)
    words[: 2 * used_rows].view(np.int64)[:] = records.seeds.take(columns)
    numbers = words[layout.numbers : layout.bias_starts].reshape(NUM_ROW_WORDS - 2, -1)
    numbers[: len(SEQUENCE_FIELDS), :used_rows] = records.numbers.take(columns, axis=1)
    of_step = (positions, -1 if bitmask_rows is None else bitmask_rows, flags)
    for packed, column in zip(numbers[len(SEQUENCE_FIELDS) :], of_step, strict=True):
        packed[:used_rows] = column
    numbers[:, used_rows:] = _IDLE
    if biases:
        bias_starts = words[layout.bias_starts :][: num_rows + 1]
        bias_starts[1 : used_rows + 1] = np.cumsum([len(ids) for ids, _ in biases])
        bias_starts[used_rows + 1 :] = used_biases
        words[layout.bias_ids :][:used_biases] = np.concatenate([ids for ids, _ in biases])
        words[layout.biases :][:used_biases] = np.concatenate([values for _, values in biases])
    asked = int(np.bitwise_or.reduce(flags))
    return PackedSampling(words, num_rows, num_biases, filters=bool(asked & FILTERS), adjusts=bool(asked & ADJUSTS))


# What a row says that fills up: no seed, nothing asked for, no bitmask.
_IDLE = np.array([*record_of(RowSampling(seed=0, temperature=0)).numbers, *(0, 0), *(0, -1, 0)], np.int32)[:, None]
