"""What the kernel table measures: one operation at one size, by us and by others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.gpu.machine import Call


@dataclass(frozen=True, slots=True)
class Subject:
    """`make(seed)` gives inputs of their own and, for each who computes them ("llmd" and others), the call."""

    name: str
    make: Callable[[int], Mapping[str, Call]]
    bytes_moved: int  # as cost.py has it
    operations: int
