"""Weights from files to a device that does not share the host's memory: several threads, each with one buffer that the
device can copy from. The bytes pass through no other memory of the host. Knows files and tensors, no model.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# While one thread's buffer is copied to the device, the others read.
NUM_THREADS = 4
BUFFER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class StagedRead:
    """Rows of a tensor in a file, all their columns or some, and where they go."""

    file: Path
    offset: int  # of the first row's first byte
    dtype: torch.dtype  # in the file
    row_elements: int  # of a whole row in the file
    target: Tensor  # [num_rows, …]: on the device; converted to its dtype
    columns: slice | None = None  # which of a row's elements the target holds; None = all, whatever their shape

    @property
    def row_bytes(self) -> int:
        return self.row_elements * self.dtype.itemsize

    def parts(self, max_bytes: int) -> "Iterator[StagedRead]":
        """The same in pieces of at most so many bytes, or of one row."""
        rows = max(1, max_bytes // max(1, self.row_bytes))
        for start in range(0, self.target.shape[0], rows):
            yield StagedRead(
                self.file,
                self.offset + start * self.row_bytes,
                self.dtype,
                self.row_elements,
                self.target[start : start + rows],
                self.columns,
            )


def run_reads(
    reads: Iterable[StagedRead],
    *,
    device: torch.device,
    done: Callable[[int], None],
    num_threads: int = NUM_THREADS,
    buffer_bytes: int = BUFFER_BYTES,
) -> None:
    """Do them all. `done` hears, one call at a time, of bytes that have reached their target.

    Raises OSError for a file that cannot be read or ends early.
    """
    telling = threading.Lock()

    def tell(num_bytes: int) -> None:
        with telling:
            done(num_bytes)

    reads = list(reads)
    with ExitStack() as opened, ThreadPoolExecutor(num_threads, thread_name_prefix="weights") as threads:
        files = {file: os.open(file, os.O_RDONLY) for file in dict.fromkeys(read.file for read in reads)}
        for descriptor in files.values():
            opened.callback(os.close, descriptor)
        work = _Shared(part for read in reads for part in read.parts(buffer_bytes))
        # a row is read as a whole, however long
        needed_bytes = max(buffer_bytes, *(read.row_bytes for read in reads), 0)
        stagers = [threads.submit(_stage, work, files, needed_bytes, device, tell) for _ in range(num_threads)]
        for stager in stagers:
            stager.result()


class _Shared:
    """Parts, each for the first thread that asks."""

    def __init__(self, parts: Iterator[StagedRead]) -> None:
        self._parts = parts
        self._taking = threading.Lock()

    def take(self) -> StagedRead | None:
        with self._taking:
            return next(self._parts, None)


def _stage(
    work: _Shared, files: dict[Path, int], buffer_bytes: int, device: torch.device, tell: Callable[[int], None]
) -> None:
    """One thread: read, copy, and again once the device has taken what was read."""
    part = work.take()
    if part is None:
        return
    is_cuda = device.type == "cuda"
    buffer = torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=is_cuda)
    stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
    if stream is not None:
        # the targets' memory may still be in use by work that was put in before they were allocated
        stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        while part is not None:
            num_bytes = part.target.shape[0] * part.row_bytes
            _read(files[part.file], buffer[:num_bytes], part.offset, part.file)
            _copy(part, buffer[:num_bytes], device)
            if stream is not None:
                stream.synchronize()
            tell(part.target.nbytes)
            part = work.take()


def _read(descriptor: int, buffer: Tensor, offset: int, file: Path) -> None:
    unread = memoryview(buffer.numpy().data)
    while unread:
        num_read = os.preadv(descriptor, [unread], offset)
        if num_read == 0:
            raise OSError(f"{file} ended while it was read: it has become shorter since it was opened")
        unread, offset = unread[num_read:], offset + num_read


def _copy(part: StagedRead, staged: Tensor, device: torch.device) -> None:
    """To the device as it is, then into place: there it is converted and cut, if it must be."""
    rows = staged.view(part.dtype)
    if part.columns is None and part.dtype == part.target.dtype and part.target.is_contiguous():
        part.target.view(-1).copy_(rows, non_blocking=True)
        return
    arrived = rows.to(device, non_blocking=True).view(part.target.shape[0], part.row_elements)
    if part.columns is not None:
        arrived = arrived[:, part.columns]
    part.target.copy_(arrived.view(part.target.shape))
