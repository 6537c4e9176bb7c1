"""A machine without a GPU for the same measurements: kernels interpreted on CPU tensors, the host's clock.

Nothing that it measures means anything; that every line of the measurements runs is what it is for.
"""

import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from bench.gpu.machine import Call, Recorded
from bench.gpu.results import Values
from bench.gpu.sizes import TINY
from llmd_kernels import dispatch
from llmd_kernels.paged_attention import triton_ops as attention
from tests.kernels.proof.interpreter import interpreted


class Rehearsal:
    """Looks like a small GPU of the architecture that the shipped tiles are for."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        # Kernels that are first imported while they are interpreted would be none for the compiler any more.
        importlib.import_module("tests.kernels.proof.registry")
        self.device = torch.device("cpu")
        self.name = "rehearsal on a CPU"
        self.arch = "sm_90"
        self.num_processors = 4
        self.cache_bytes = 1 << 10
        self.sizes = TINY

    def describe(self) -> Values:
        return {"arch": self.arch, "processors": self.num_processors, "L2 bytes": self.cache_bytes}

    @contextmanager
    def running(self) -> Iterator[None]:
        processors = attention.Processors(self.arch, self.num_processors)
        with (
            interpreted(),
            patch.object(dispatch, "TRITON_DEVICES", dispatch.TRITON_DEVICES | {"cpu"}),
            patch.object(attention, "processors", lambda device: processors),
        ):
            yield

    def synchronize(self) -> None:
        pass

    def elapsed(self, work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def record(self, calls: Sequence[Call]) -> Recorded:
        def again() -> None:
            for call in calls:
                call()

        return Recorded(again, "calls")

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """As it is: a compiler's minute would rehearse the compiler."""
        return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))
