"""How long one call takes on a device, with inputs that its last cache does not hold."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.gpu.machine import Call, Machine
from bench.gpu.results import Value

# Inputs rotate over so many times what the last cache holds.
_CACHES = 4


@dataclass(frozen=True, slots=True)
class Timing:
    seconds: float  # of one call: the median over repeats of the mean over the sets of inputs
    spread: float  # (slowest - fastest) / median of the repeats
    how: str  # see machine.Recorded


def num_input_sets(machine: Machine, num_bytes: int) -> int:
    """Sets of inputs of so many bytes to rotate among; at most `max_input_sets`, so tiny ones stay in the cache."""
    wanted = math.ceil(_CACHES * machine.cache_bytes / max(num_bytes, 1)) + 1
    return max(2, min(wanted, machine.sizes.max_input_sets))


def time_calls(machine: Machine, calls: list[Call]) -> Timing:
    """All of `calls` again and again; each has inputs of its own and has the same work to do."""
    for call in calls:
        call()
    machine.synchronize()
    recorded = machine.record(calls)
    recorded.replay()
    machine.synchronize()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < machine.sizes.repeats:
        times.append(machine.elapsed(recorded.replay) / len(calls))
        if time.perf_counter() - started > machine.sizes.min_timed and len(times) >= machine.sizes.repeats / 4:
            break
    median = statistics.median(times)
    return Timing(median, (max(times) - min(times)) / median, recorded.how)


def time_made(machine: Machine, make: Callable[[int], Call], *, num_bytes: int) -> Timing:
    """`make(seed)` gives a call with inputs of its own."""
    return time_calls(machine, [make(seed) for seed in range(num_input_sets(machine, num_bytes))])


def microseconds(timing: Timing) -> Value:
    return round(timing.seconds * 1e6, 2)
