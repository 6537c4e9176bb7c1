"""What the host sends for a step, in one copy:

draws      how tokens are drawn: columns of max_rows rows (llmd_kernels' packing of sampling)
step       which rows run and what is new in the tables (llmd_kernels' packing of steps)
biases     what is added to logits, where rows ask for it
attention  the work lists of all kinds of layers, where the host has planned them (llmd_kernels' packing of work)

Each begins at a multiple of 16 bytes; the first two at the same place in all steps of max_rows, so that captured
launches find them.
"""

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
    PackedWork,
    SamplingRecords,
    WorkLists,
    pack_sampling,
    pack_step,
    packed_sampling_size,
    plain_sampling,
)

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A step on the host, ready to be copied."""

    numbers: Numbers
    max_rows: int
    draws: PackedSampling
    draws_plainly: bool  # all tokens depend on nothing but logits, temperature and noise, and only ids are wanted
    biases_start: int
    work: PackedWork | None
    work_start: int


def pack(
    rows: StepRows,
    new_entries: Sequence[NewEntries],
    records: SamplingRecords,
    *,
    max_rows: int,
    can_draw: bool,
    work: PackedWork | None = None,
) -> PackedStep:
    """At most `max_rows` rows. records: by place; can_draw: whether the model can draw plainly."""
    num_before = packed_sampling_size(max_rows)
    numbers = pack_step(rows.given.T, new_entries, max_rows=max_rows, num_before=num_before)
    places, positions = rows.drawing_places_and_positions
    draws = pack_sampling(records, columns=places, positions=positions, max_rows=max_rows, out=numbers)
    biases_start = len(numbers)
    if work is not None:
        numbers = np.concatenate((numbers, draws.bias_words, work.numbers))
    elif draws.num_biases:
        numbers = np.concatenate((numbers, draws.bias_words))
    return PackedStep(
        numbers,
        max_rows,
        draws,
        draws_plainly=can_draw and not (draws.filters or draws.adjusts or rows.num_logprobs),
        biases_start=biases_start,
        work=work,
        work_start=biases_start + len(draws.bias_words),
    )


class StepMemory:
    """Where steps are copied to, and views of what lies there, each made once."""

    def __init__(self, numbers: Tensor, *, history: Tensor) -> None:
        """numbers: int32, on the device; history: the tables' token ids."""
        self.numbers = numbers
        self._history = history
        # by max_rows, num_rows, and what rows ask for: filters, adjusts
        self._draws: dict[tuple[int, int, bool, bool], DeviceSampling] = {}

    def step(self, *, max_rows: int) -> Tensor:
        """The part that the kernels of step preparation read."""
        return self.numbers[packed_sampling_size(max_rows) :]

    def plain_draws(self, *, max_rows: int, num_rows: int) -> DeviceSampling:
        """How the first `num_rows` tokens are drawn, if plainly."""
        key = max_rows, num_rows, False, False
        if key not in self._draws:
            self._draws[key] = plain_sampling(self.numbers, num_rows=num_rows, max_rows=max_rows, history=self._history)
        return self._draws[key]

    def draws(self, packed: PackedStep) -> DeviceSampling:
        """How the tokens of a step that was copied here are drawn."""
        draws = packed.draws
        key = draws.max_rows, draws.num_rows, draws.filters, draws.adjusts
        if key in self._draws and not draws.num_biases:
            return self._draws[key]
        plain = self.plain_draws(max_rows=draws.max_rows, num_rows=draws.num_rows)
        views = draws.on_device(plain, self.numbers[packed.biases_start :])
        if not draws.num_biases:
            self._draws[key] = views
        return views

    def work(self, packed: PackedStep) -> WorkLists | None:
        """Its work lists, if the host has planned them."""
        return None if packed.work is None else packed.work.on_device(self.numbers[packed.work_start :])
