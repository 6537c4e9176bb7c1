"""What the host sends for a step, in one copy:

draws     how tokens are drawn, if plainly: of max_rows draws, so that captured launches find them at one place
step      which rows run and what is new in the tables: see llmd_kernels' packing of steps
sampling  how tokens are drawn otherwise
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from llmd.worker.places import StepRows
from llmd_kernels import (
    DeviceSampling,
    NewEntries,
    PackedSampling,
    SamplingRecords,
    pack_sampling,
    pack_step,
    packed_size,
)

Numbers = npt.NDArray[np.int32]

# Parts begin at multiples of 16 bytes.
_ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A step on the host, ready to be copied."""

    numbers: Numbers
    max_rows: int
    num_step_numbers: int
    sampling: PackedSampling | None  # None: all tokens are drawn plainly

    @property
    def draws_plainly(self) -> bool:
        return self.sampling is None

    def sampling_of(self, on_device: Tensor, *, history: Tensor) -> DeviceSampling:
        """How its tokens are drawn (and max_rows in all, if plainly), from the copy on the device.

        history: the tables' token ids.
        """
        if self.sampling is None:
            return draws_of(on_device, max_rows=self.max_rows, history=history)
        start = _aligned(_step_start(self.max_rows) + self.num_step_numbers)
        return self.sampling.on_device(on_device[start:], history=history)


def pack(
    rows: StepRows, new_entries: Sequence[NewEntries], records: SamplingRecords, *, max_rows: int, can_draw: bool
) -> PackedStep:
    """At most `max_rows` rows. records: by place; can_draw: whether the model can draw plainly."""
    draws, sampling = _packed_draws(rows, records, max_rows=max_rows, can_draw=can_draw)
    start = _step_start(max_rows)
    num_step_numbers = packed_size(max_rows, new_entries)
    end = start + num_step_numbers
    sampling_start = _aligned(end)
    numbers = np.zeros(end if sampling is None else sampling_start + len(sampling.words), np.int32)
    numbers[: len(draws.words)] = draws.words
    pack_step(rows.given.T, new_entries, numbers[start:end], max_rows=max_rows)
    if sampling is not None:
        numbers[sampling_start:] = sampling.words
    return PackedStep(numbers, max_rows, num_step_numbers, sampling)


def step_of(numbers: Tensor, *, max_rows: int) -> Tensor:
    """The part that the kernels of step preparation read."""
    return numbers[_step_start(max_rows) :]


def draws_of(numbers: Tensor, *, max_rows: int, history: Tensor) -> DeviceSampling:
    """How `max_rows` tokens are drawn plainly."""
    return _no_draws(max_rows).on_device(numbers, history=history)


def _packed_draws(
    rows: StepRows, records: SamplingRecords, *, max_rows: int, can_draw: bool
) -> tuple[PackedSampling, PackedSampling | None]:
    """How tokens are drawn plainly, and how otherwise if any is not.

    A token is drawn plainly that depends on nothing but logits, temperature and noise, if nothing is wanted but its id.
    """
    drawing = rows.drawing
    places, positions = rows.places[drawing], rows.output_positions[drawing]
    are_plain = can_draw and not records.flags(places, positions).any() and not (rows.num_logprobs[drawing] >= 0).any()
    packed = pack_sampling(
        records,
        columns=places,
        positions=positions,
        num_rows=max_rows if are_plain else None,
    )
    return (packed, None) if are_plain else (_no_draws(max_rows), packed)


@functools.cache
def _no_draws(max_rows: int) -> PackedSampling:
    return pack_sampling(SamplingRecords(0), columns=[], positions=[], num_rows=max_rows)


def _step_start(max_rows: int) -> int:
    return _aligned(len(_no_draws(max_rows).words))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
