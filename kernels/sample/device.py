"""How rows are to be drawn, as tensors on a device: packed by the host into words that are sent with a step.

Knows no kernel. The host need not know which tokens were drawn: only how many each sequence has.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmd_kernels.sample.batch import RowSampling
from llmd_kernels.sample.records import ADJUSTS, FILTERS, SEQUENCE_FIELDS, Biases, SamplingRecords, Words, record_of

# Words of a row that change at each step.
STEP_FIELDS = ("position", "bitmask_row", "flags")
NUM_ROW_WORDS = 2 + len(SEQUENCE_FIELDS) + len(STEP_FIELDS)


@dataclass(frozen=True, slots=True)
class DeviceSampling:
    """R rows; made by `plain_sampling` and `PackedSampling.on_device`.

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
    """Where the columns of `max_rows` rows begin in a buffer, in words: the seeds do at 0, these follow.

    Each begins at a multiple of 16 bytes, whatever the number of rows: Triton compiles anew for other addresses.
    """

    numbers: int
    bias_starts: int
    num_words: int

    @staticmethod
    @functools.cache
    def of(max_rows: int) -> "Layout":
        column = _aligned(max_rows)
        bias_starts = NUM_ROW_WORDS * column
        return Layout(2 * column, bias_starts, bias_starts + _aligned(max_rows + 1))


def _aligned(num_words: int) -> int:
    return -(-num_words // 4) * 4


@dataclass(frozen=True, slots=True)
class PackedSampling:
    """The rows of one step on the host."""

    words: Words  # columns of max_rows rows, as in Layout
    bias_words: Words  # token ids, then what is added to their logits; each to a multiple of 16 bytes
    num_rows: int  # in use; the others are greedy and ask for nothing
    max_rows: int
    num_biases: int
    filters: bool
    adjusts: bool

    def on_device(
        self, columns: DeviceSampling, bias_words: Tensor, *, bitmask: Tensor | None = None
    ) -> DeviceSampling:
        """columns: `plain_sampling` of a copy of `words`, bias_words: begins with a copy of them. Nothing is copied."""
        biases = _aligned(self.num_biases)
        return replace(
            columns,
            bias_ids=bias_words[: self.num_biases],
            biases=bias_words[biases : biases + self.num_biases].view(torch.float32),
            bitmask=bitmask,
            filters=self.filters,
            adjusts=self.adjusts,
        )

    def copied_to(self, device: torch.device, *, history: Tensor, bitmask: Tensor | None = None) -> DeviceSampling:
        """The rows in use, in memory of their own."""
        words, bias_words = (torch.from_numpy(part).to(device) for part in (self.words, self.bias_words))
        columns = plain_sampling(words, num_rows=self.num_rows, max_rows=self.max_rows, history=history)
        return self.on_device(columns, bias_words, bitmask=bitmask)


def plain_sampling(words: Tensor, *, num_rows: int, max_rows: int, history: Tensor) -> DeviceSampling:
    """The first rows of a copy of packed words on the device, for draws that need no more than temperature and noise.

    words: int32, its start at a multiple of 8 bytes. Views alone: they serve whatever is copied there.
    """
    layout = Layout.of(max_rows)
    numbers = words[layout.numbers : layout.bias_starts].view(NUM_ROW_WORDS - 2, -1)[:, :num_rows]
    column = dict(zip((*SEQUENCE_FIELDS, *STEP_FIELDS), numbers, strict=True))
    nothing = words[:0]
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
        bias_ids=nothing,
        biases=nothing.view(torch.float32),
        bitmask_rows=column["bitmask_row"],
        bitmask=None,
        flags=column["flags"],
        filters=False,
        adjusts=False,
    )


def packed_sampling_size(max_rows: int) -> int:
    """Words that `pack_sampling` writes: a multiple of 16 bytes."""
    return Layout.of(max_rows).num_words


def pack_sampling(
    records: SamplingRecords,
    *,
    columns: npt.ArrayLike,
    positions: npt.ArrayLike,
    bitmask_rows: npt.ArrayLike | None = None,
    max_rows: int | None = None,
    out: Words | None = None,
) -> PackedSampling:
    """One entry a row each; columns: which records are theirs, positions: which output token each draws, from 0.

    max_rows: fill up to so many with rows that are greedy and ask for nothing. out: where to write the words, at least
    packed_sampling_size(max_rows). ValueError if there are more rows.
    """
    columns, positions = np.asarray(columns, np.intp), np.asarray(positions, np.int32)
    num_rows = len(columns)
    max_rows = num_rows if max_rows is None else max_rows
    if num_rows > max_rows:
        raise ValueError(f"{num_rows} rows do not fit {max_rows}")
    flags = np.zeros(num_rows, np.int32) if records.asks_nothing else records.flags(columns, positions)
    asked = 0 if records.asks_nothing else int(np.bitwise_or.reduce(flags))
    biases = records.biases(columns, positions) if asked & ADJUSTS else []
    if bitmask_rows is not None:
        flags |= np.where(np.asarray(bitmask_rows) >= 0, ADJUSTS, 0).astype(np.int32)
        asked |= int(np.bitwise_or.reduce(flags))
    layout = Layout.of(max_rows)
    words = np.empty(layout.num_words, np.int32) if out is None else out[: layout.num_words]
    seeds = words[: layout.numbers].view(np.int64)
    seeds[:num_rows] = records.seeds.take(columns)
    seeds[num_rows:] = 0
    numbers = words[layout.numbers : layout.bias_starts].reshape(NUM_ROW_WORDS - 2, -1)
    numbers[: len(SEQUENCE_FIELDS), :num_rows] = records.numbers.take(columns, axis=1)
    numbers[-3, :num_rows] = positions
    numbers[-2, :num_rows] = -1 if bitmask_rows is None else bitmask_rows
    numbers[-1, :num_rows] = flags
    numbers[:, num_rows:] = _IDLE
    bias_starts = words[layout.bias_starts :]
    bias_starts[:] = 0
    if biases:
        bias_starts[1 : num_rows + 1] = np.cumsum([len(ids) for ids, _ in biases])
        bias_starts[num_rows + 1 :] = bias_starts[num_rows]
    bias_words, num_biases = _bias_words(biases)
    return PackedSampling(
        words, bias_words, num_rows, max_rows, num_biases, bool(asked & FILTERS), bool(asked & ADJUSTS)
    )


def _bias_words(biases: Sequence[Biases]) -> tuple[Words, int]:
    """All token ids, then all that is added; and how many."""
    if not biases:
        return _NO_WORDS, 0
    ids, added = (np.concatenate(part) for part in zip(*biases, strict=True))
    words = np.zeros((2, _aligned(len(ids))), np.int32)
    words[:, : len(ids)] = ids, added
    return words.reshape(-1), len(ids)


_NO_WORDS = np.zeros(0, np.int32)
# What a row says that fills up: no seed, nothing asked for, no bitmask.
_IDLE = np.array([*record_of(RowSampling(seed=0, temperature=0)).numbers, *(0, 0), *(0, -1, 0)], np.int32)[:, None]
