"""Where work on texts runs: templates, tokenization, detokenization. In the event loop if it is a moment's work, else
in one of few threads. Knows nothing of what the work is."""

from collections.abc import Callable
from typing import TypeVar

import trio

from llmd.errors import Overloaded

Result = TypeVar("Result")

# All in characters or tokens. A megabyte of text takes about half a second.
THREAD_FROM = 4096  # about a millisecond of work
LONG_FROM = 1 << 18
MAX_PENDING = 1 << 26  # of all that runs and waits: it is in memory

NUM_THREADS = 2
NUM_LONG_THREADS = 1

_RETRY_AFTER = 5.0  # seconds


class TextThreads:
    """Two lanes, so that short texts overtake: a hundred long ones hold up only one another.

    A thread that computes takes turns with the event loop (the interpreter has one lock), so there must be few.
    """

    def __init__(self) -> None:
        self._lane = trio.CapacityLimiter(NUM_THREADS)
        self._long_lane = trio.CapacityLimiter(NUM_LONG_THREADS)
        self._num_pending = 0

    async def run(self, size: int, work: Callable[[], Result]) -> Result:
        """`work()`, in a thread if there is much to do. A client that leaves does not wait for the thread.

        Raises Overloaded if so much waits already that one more would fill the memory.
        """
        if size < THREAD_FROM:
            return work()
        if self._num_pending and self._num_pending + size > MAX_PENDING:
            raise Overloaded(
                f"Prompts of {self._num_pending} characters wait to be tokenized, which is as much as this server "
                "takes. Please try again later.",
                retry_after=_RETRY_AFTER,
            )
        self._num_pending += size
        try:
            lane = self._lane if size < LONG_FROM else self._long_lane
            return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=lane)
        finally:
            self._num_pending -= size
