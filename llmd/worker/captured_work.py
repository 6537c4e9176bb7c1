"""Work that is done again and again with the same launches: as it is at first, later as a graph.

Knows how often which work was done, not what it is.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from llmd.errors import StartupFailed
from llmd.worker.stream import Stream

Key = TypeVar("Key", bound=Hashable)


class CapturedWork(Generic[Key]):
    """The work of each key. `keys` are all that there are, those that are worth most first."""

    def __init__(self, stream: Stream, work: Callable[[Key], None], keys: Iterable[Key]) -> None:
        self._stream = stream
        self._work = work
        self._without_graph = dict.fromkeys(keys)  # in order
        self._has_run: set[Key] = set()
        self._graphs: dict[Key, Callable[[], None]] = {}

    def run(self, key: Key) -> None:
        """Do the work of this key: launch by launch the first time, then it is captured.

        StartupFailed where that cannot be: it would fail again.
        """
        if key not in self._graphs:
            if key not in self._has_run:
                self._work(key)
                self._has_run.add(key)
                return
            self._graphs[key] = self._capture(key)
            del self._without_graph[key]
        self._graphs[key]()

    def next_to_capture(self) -> Key | None:
        """The first key without a graph."""
        return next(iter(self._without_graph), None)

    def _capture(self, key: Key) -> Callable[[], None]:
        try:
            return self._stream.capture(lambda: self._work(key))
        except Exception as error:
            raise StartupFailed(
                f"{key} could not be captured as a graph ({type(error).__name__}: {error}). Start with "
                "--enforce-eager, which captures nothing; a smaller --gpu-memory-utilization leaves graphs more memory"
            ) from error
