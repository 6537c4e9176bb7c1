"""The memory that one launch may touch: bounds of every lane, races between programs, and bytes moved by argument.

Knows addresses and programs only, nothing of Triton.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

Access = Literal["load", "store", "atomic"]
IntArray = np.ndarray[Any, np.dtype[np.int32]]
Addresses = np.ndarray[Any, np.dtype[np.uint64]]

NOBODY, SEVERAL = -1, -2


class OutOfBounds(Exception):
    """A lane that is not masked points outside of the launch's tensors."""


class Race(Exception):
    """Two programs touch the same number, one of them writes, and nothing orders them."""


@dataclass
class Region:
    """One argument's bytes (or those of several that overlap), and who touched which of its numbers last."""

    name: str
    start: int
    stop: int
    unit: int  # bytes of a number
    loaded: int = 0  # bytes, counted at every load
    stored: int = 0
    reader: IntArray = field(init=False)
    writer: IntArray = field(init=False)
    atomic_writer: IntArray = field(init=False)
    # The clock of reader, writer and atomic_writer at that time.
    read_at: IntArray = field(init=False)
    written_at: IntArray = field(init=False)
    atomic_at: IntArray = field(init=False)

    def __post_init__(self) -> None:
        size = -(-(self.stop - self.start) // self.unit)
        self.reader, self.writer, self.atomic_writer = (np.full(size, NOBODY, np.int32) for _ in range(3))
        self.read_at, self.written_at, self.atomic_at = (np.zeros(size, np.int32) for _ in range(3))

    @property
    def distinct_loaded(self) -> int:
        """Bytes that were loaded at least once: what must come from memory if the caches were perfect."""
        return int((self.reader != NOBODY).sum()) * self.unit

    @property
    def distinct_stored(self) -> int:
        return int((self.writer != NOBODY).sum()) * self.unit


class Memory:
    """What one launch's tensors hold and who may touch it when; `program` is the one that runs now.

    Programs run one after another here, but on a device in any order: two are ordered only where one has released
    (an atomic with release semantics) what the other then acquires at the same address.
    """

    def __init__(self, tensors: Mapping[str, Tensor], num_programs: int) -> None:
        self.regions = _regions(tensors)
        self.program = 0
        self._starts = np.array([region.start for region in self.regions], np.uint64)
        self._clock = np.zeros(num_programs, np.int32)
        # For each program, the clock up to which it has seen each other program's work.
        self._seen: dict[int, IntArray] = {}
        # What an acquire of an address makes seen.
        self._released: dict[int, IntArray] = {}

    def region(self, name: str) -> Region:
        """The region of an argument."""
        return next(region for region in self.regions if name in region.name.split(" + "))

    def touch(self, access: Access, addresses: Addresses, itemsize: int, *, ordering: str = "") -> None:
        """All lanes of one operation that are not masked: check them and take note.

        `ordering` of an atomic: RELAXED, ACQUIRE, RELEASE or ACQUIRE_RELEASE.
        """
        if not addresses.size:
            return
        which = np.searchsorted(self._starts, addresses, side="right") - 1
        self._check_bounds(access, addresses, which, itemsize)
        if "ACQUIRE" in ordering:
            for address in np.unique(addresses):
                if int(address) in self._released:
                    np.maximum(self._seen_here(), self._released[int(address)], out=self._seen_here())
        for index in np.unique(which):
            region = self.regions[index]
            offsets = (addresses[which == index] - np.uint64(region.start)).astype(np.int64)
            units = offsets // region.unit
            if itemsize > region.unit:
                units = (units[:, None] + np.arange(itemsize // region.unit)).reshape(-1)
            self._note(access, region, units, num_bytes=offsets.size * itemsize)
        if "RELEASE" in ordering:
            seen = self._seen_here().copy()
            seen[self.program] = self._clock[self.program]
            for address in np.unique(addresses):
                before = self._released.get(int(address), seen)
                self._released[int(address)] = np.maximum(before, seen)
            self._clock[self.program] += 1

    def _check_bounds(self, access: Access, addresses: Addresses, which: Any, itemsize: int) -> None:
        stops = np.array([region.stop for region in self.regions], np.uint64)
        outside = (which < 0) | (addresses + np.uint64(itemsize) > stops[np.maximum(which, 0)])
        if not outside.any():
            return
        lane = int(np.flatnonzero(outside)[0])
        region = self.regions[max(int(which[lane]), 0)]
        raise OutOfBounds(
            f"program {self.program}: {access} out of bounds in {int(outside.sum())} of {outside.size} lanes; the first"
            f" is at byte {int(addresses[lane]) - region.start} of {region.name} ({region.stop - region.start} bytes)"
        )

    def _note(self, access: Access, region: Region, units: Any, *, num_bytes: int) -> None:
        me, now = self.program, self._clock[self.program]
        self._check_order(access, "stored", region, units, region.writer, region.written_at)
        if access != "atomic":
            self._check_order(access, "changed", region, units, region.atomic_writer, region.atomic_at)
        if access == "load":
            others = region.reader[units]
            alone = (others == NOBODY) | (others == me) | self._is_seen(others, region.read_at[units])
            region.reader[units] = np.where(alone, me, SEVERAL)
            region.read_at[units] = now
            region.loaded += num_bytes
            return
        self._check_order(access, "loaded", region, units, region.reader, region.read_at)
        if access == "atomic":
            region.atomic_writer[units], region.atomic_at[units] = me, now
            return
        if np.unique(units).size != units.size:
            raise Race(f"program {me}: two lanes of one store write the same number of {region.name}")
        region.writer[units], region.written_at[units] = me, now
        region.stored += num_bytes

    def _check_order(
        self, access: Access, past: str, region: Region, units: Any, who: IntArray, when: IntArray
    ) -> None:
        others, clocks = who[units], when[units]
        racing = (others != NOBODY) & (others != self.program) & ~self._is_seen(others, clocks)
        if racing.any():
            other = int(others[racing][0])
            by = "several programs" if other == SEVERAL else f"program {other}"
            raise Race(
                f"program {self.program}: {access} of {int(racing.sum())} numbers of {region.name} that {by} {past},"
                f" the first is number {int(np.asarray(units)[racing][0])}"
            )

    def _is_seen(self, programs: IntArray, clocks: IntArray) -> Any:
        """Which of these events (program, its clock then) are ordered before what runs now."""
        if self.program not in self._seen:
            return np.zeros(programs.shape, bool)
        return (programs >= 0) & (clocks <= self._seen[self.program][np.maximum(programs, 0)])

    def _seen_here(self) -> IntArray:
        return self._seen.setdefault(self.program, np.full(self._clock.size, -1, np.int32))


def _regions(tensors: Mapping[str, Tensor]) -> list[Region]:
    """One region a tensor, from its first number to its last; tensors that overlap share one."""
    regions: list[Region] = []
    spans = []
    for name, tensor in tensors.items():
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((tensor.data_ptr(), (last + 1) * tensor.element_size(), tensor.element_size(), name))
    for start, num_bytes, unit, name in sorted(spans):
        if regions and start < regions[-1].stop:
            last_region = regions.pop()
            names, stop = f"{last_region.name} + {name}", max(last_region.stop, start + num_bytes)
            regions.append(Region(names, last_region.start, stop, min(unit, last_region.unit)))
        else:
            regions.append(Region(name, start, start + num_bytes, unit))
    return regions
