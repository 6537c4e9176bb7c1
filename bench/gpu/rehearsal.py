"""A machine without a GPU for the same measurements: kernels interpreted on CPU tensors, the host's clock.

Nothing that it measures means anything; that every line of the measurements runs is what it is for.
"""

import functools
import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

import llmd_kernels
from bench.gpu.machine import Call, Recorded
from bench.gpu.results import Values
from bench.gpu.sizes import TINY
from llmd.worker.stream import Stream
from llmd_kernels import dispatch
from llmd_kernels.paged_attention import triton_ops as attention
from tests.kernels.proof.interpreter import interpreted
from tests.kernels.proof.memory import Memory
from tests.worker.recorder import RecordingStream


class Rehearsal:
    """Looks like a small GPU of the architecture that the shipped tiles are for."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        # Kernels that are first imported while they are interpreted would be none for the compiler any more.
        for module in pkgutil.walk_packages(llmd_kernels.__path__, "llmd_kernels."):
            importlib.import_module(module.name)
        self.device = torch.device("cpu")
        self.name = "rehearsal on a CPU"
        self.arch = "sm_90"
        self.num_processors = 4
        self.cache_bytes = 1 << 10
        self.sizes = TINY

    def describe(self) -> Values:
        return {"arch": self.arch, "processors": self.num_processors, "L2 bytes": self.cache_bytes}

    @contextmanager
    def running(self, *, whole_model: bool = False) -> Iterator[None]:
        processors = attention.Processors(self.arch, self.num_processors)
        # Races are looked for where each kernel is proven; in a step all padding tokens write to the same slot.
        watched: AbstractContextManager[object] = (
            patch.object(Memory, "_note", lambda *_, **__: None) if whole_model else nullcontext()
        )
        with (
            interpreted(),
            watched,
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

    def stream(self) -> Stream:
        return RecordingStream()

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """As it is: a compiler's minute would rehearse the compiler."""
        return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))
