"""A device's queue of work as the runner needs it: copies that nobody waits for, and graphs that repeat recorded work.

Knows nothing of steps and models.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Download(Protocol):
    """A copy on its way from the device."""

    def wait(self) -> Tensor:
        """The numbers in the host's memory, once they are there. Any thread may wait."""


class Stream(Protocol):
    """Work runs in the order in which it is put in; nothing here waits for the device but `Download.wait`."""

    def upload(self, numbers: npt.NDArray[np.int32], target: Tensor) -> None:
        """Copy to the first numbers of `target` (int32, on the device). The array may be changed right after."""

    def download(self, source: Tensor) -> Download:
        """Copy what `source` holds when the work before is done."""

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        """Record the operations of `work` without running them → a function that runs them.

        They read and write the same memory each time, and every number that the host gave them stays as it was. What
        they allocate is theirs only until other work is put in: a result must be copied to memory from outside.
        `work` must have run before, so that its kernels are compiled and loaded.
        """


class CudaStream:
    """A stream of its own on a GPU, which becomes the calling thread's current one: graphs need one that is not the
    default. Copies go through pinned memory. One thread puts work in.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = PinnedBuffers()
        self._graph_memory = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # weights may still be on their way
        stream.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.set_stream(stream)

    def upload(self, numbers: npt.NDArray[np.int32], target: Tensor) -> None:
        # PyTorch keeps it and gives it out again once the device is done with it
        pinned = torch.empty(len(numbers), dtype=torch.int32, pin_memory=True)
        pinned.numpy()[:] = numbers
        target[: len(numbers)].copy_(pinned, non_blocking=True)

    def download(self, source: Tensor) -> Download:
        buffer = self._pinned.take(source.nbytes)
        pinned = buffer[: source.nbytes].view(source.dtype).view(source.shape)
        pinned.copy_(source, non_blocking=True)
        # who waits for it sleeps: the core is the one's that launches the next step
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        arrived.record()
        return _CudaDownload(arrived, pinned, lambda: self._pinned.give_back(buffer))

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # one pool for all graphs, which never run at the same time; another thread may be waiting for a download
        graph.capture_begin(pool=self._graph_memory, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            # what cannot be captured often breaks the capture, which then cannot be ended: the first error says why
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
        replay: Callable[[], None] = graph.replay
        return replay


class PinnedBuffers:
    """Pinned memory for downloads, which is kept for others like it and never freed.

    Freeing it has PyTorch record an event on the stream that copied to it. The thread that reads a download may do that
    while another captures the stream, and of such an event nobody can ever ask whether it is done.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, deque[Tensor]] = defaultdict(deque)

    def take(self, num_bytes: int) -> Tensor:
        """At least so many bytes, uint8."""
        size = 1 << num_bytes.bit_length()
        free = self._free[size]
        return free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def give_back(self, buffer: Tensor) -> None:
        """Any thread may."""
        self._free[len(buffer)].append(buffer)


class _CudaDownload:
    def __init__(self, arrived: torch.cuda.Event, pinned: Tensor, done: Callable[[], None]) -> None:
        self._arrived = arrived
        self._pinned = pinned
        self._done = done

    def wait(self) -> Tensor:
        """Once."""
        self._arrived.synchronize()
        numbers = self._pinned.clone()
        self._done()
        return numbers
