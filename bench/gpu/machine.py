"""The GPU as measurements see it: its clock, its recorded work, its sizes. `rehearsal` has one without a GPU."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bench.gpu.results import Values
from bench.gpu.sizes import WHOLE, Sizes
from llmd.worker.stream import CudaStream, Stream

Call = Callable[[], object]

# Clock cycles, about 0.1 ms, that the device waits before timed work: else it would wait for the host in between.
_HEAD_START = 200_000


@dataclass(frozen=True, slots=True)
class Recorded:
    """Calls that can be repeated. `how`: "graph" replays device work alone, "calls" includes the host's launches."""

    replay: Callable[[], None]
    how: str


class Machine(Protocol):
    """What runs kernels and knows how long they took."""

    device: torch.device
    name: str
    arch: str  # "sm_90"
    num_processors: int
    cache_bytes: int  # of the last cache before memory
    sizes: Sizes

    def describe(self) -> Values: ...

    def running(self, *, whole_model: bool = False) -> AbstractContextManager[object]:
        """Inside, the public functions of `llmd_kernels` launch kernels for this machine's tensors.

        whole_model: a runner calls them, not the measurements of single ones.
        """
        ...

    def synchronize(self) -> None: ...

    def elapsed(self, work: Callable[[], None]) -> float:
        """Seconds of the device between the beginning and the end of this work."""
        ...

    def record(self, calls: Sequence[Call]) -> Recorded: ...

    def stream(self) -> Stream:
        """Where a runner's steps go; all that this thread launches from now on goes there too."""
        ...

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What torch.compile makes of it."""
        ...


class Gpu:
    """The first CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        properties = torch.cuda.get_device_properties(self.device)
        self.name = properties.name
        self.arch = f"sm_{properties.major}{properties.minor}"
        self.num_processors = properties.multi_processor_count
        self.cache_bytes = properties.L2_cache_size
        self.sizes = WHOLE

    def describe(self) -> Values:
        free, total = torch.cuda.mem_get_info(self.device)
        return {
            "arch": self.arch,
            "processors": self.num_processors,
            "L2 bytes": self.cache_bytes,
            "memory bytes": total,
            "free bytes": free,
            "CUDA": torch.version.cuda,
        }

    def running(self, *, whole_model: bool = False) -> AbstractContextManager[object]:
        return nullcontext()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def elapsed(self, work: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def record(self, calls: Sequence[Call]) -> Recorded:
        """As a CUDA graph; what cannot be captured is called again each time."""

        def again() -> None:
            for call in calls:
                call()

        graph, memory = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, pool=memory):
                again()
        except Exception:  # whatever a peer raises there
            # A capture that cannot be ended leaves its own stream as the current one. And for the allocator of torch
            # before 2.12 it goes on (pytorch#180395): it would refuse every later capture, and all memory when short.
            torch.cuda.set_stream(stream)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, memory)
            torch.cuda.synchronize(self.device)
            return Recorded(again, "calls")
        return Recorded(graph.replay, "graph")

    def stream(self) -> Stream:
        return CudaStream(self.device)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Takes time to import.
        from torch._inductor import config

        # It has one kernel: to start a process for each core takes longer than to compile that here.
        config.compile_threads = 1
        return torch.compile(function)
