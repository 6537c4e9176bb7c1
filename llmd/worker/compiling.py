"""Kernels are compiled while a model is read: a thread goes through the steps that will come, others compile what they
would launch. Knows neither model nor kernel.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import llmd
import llmd_kernels
from llmd.machine import num_free_cores
from llmd_kernels.compile_ahead import Compilation, compiling_ahead

_PROGRESS_INTERVAL = 0.1  # seconds between two messages

_log = logging.getLogger(__name__)


@contextmanager
def compiling_beside(
    rehearsal: Callable[[], Iterable[None]], *, done: Path, progress: Callable[[float], None]
) -> Iterator[None]:
    """Inside, the kernels that `rehearsal` launches are compiled beside; they are there when the block ends.

    done: a file that says that they all were compiled once and are kept; if it is there, nothing happens. progress
    hears from 0 to 1 how far it is, once the block has ended. What goes wrong here is logged and raises nothing: a
    kernel that is missing is compiled when it is launched.
    """
    if done.exists():
        yield
        return
    work = _Work(rehearsal, done)
    thread = threading.Thread(target=work.run, name="rehearsal", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        # the process ends, and would wait for what is to be compiled
        work.cancel()
        raise
    thread.join(_PROGRESS_INTERVAL)
    while thread.is_alive():
        progress(work.progress)
        thread.join(_PROGRESS_INTERVAL)


def digest_of(*facts: object) -> str:
    """Of these facts, by what they print, and of all source files that decide what is launched and compiled."""
    digest = hashlib.sha256(repr(facts).encode())
    for package in (llmd, llmd_kernels):
        for folder in package.__path__:
            for source in sorted(Path(folder).rglob("*.py")):
                digest.update(source.read_bytes())
    return digest.hexdigest()


class _Work:
    """What the thread does."""

    def __init__(self, rehearsal: Callable[[], Iterable[None]], done: Path) -> None:
        self._rehearsal = rehearsal
        self._done = done
        self._compilation: Compilation | None = None
        self._cancelled = threading.Event()

    def run(self) -> None:
        try:
            with compiling_ahead(num_threads=num_free_cores()) as compilation:
                self._compilation = compilation
                for _ in self._rehearsal():
                    if self._cancelled.is_set():
                        break
            if not self._cancelled.is_set():
                self._finish(compilation)
        except Exception:
            if not self._cancelled.is_set():
                _log.exception("kernels could not be compiled ahead; each is compiled when it is first launched")

    def cancel(self) -> None:
        self._cancelled.set()
        if self._compilation is not None:
            self._compilation.cancel()

    @property
    def progress(self) -> float:
        if self._compilation is None:
            return 0.0
        return self._compilation.num_done / max(1, len(self._compilation.kernels))

    def _finish(self, compilation: Compilation) -> None:
        errors = [error for kernel in compilation.kernels if (error := kernel.exception()) is not None]
        if errors:
            _log.warning("%d of %d kernels do not compile: %s", len(errors), len(compilation.kernels), errors[0])
            return
        self._done.parent.mkdir(parents=True, exist_ok=True)
        self._done.touch()
