"""How much memory the request bodies that come in may take, all together. Knows nothing of HTTP or of what they say."""

import os

from llmd.errors import Overloaded

# bodies of the largest size
_NUM_LARGEST = 8
_SHARE_OF_MACHINE = 4
# within which many a body that comes in will be there
_RETRY_AFTER = 5.0  # seconds


class BodyMemory:
    """Bytes of all bodies of a server process that come in or have not been decoded.

    A body may have as many as all together leave free (dynamic thresholds, Choudhury and Hahne 1998). So nobody can
    fill the memory, and however many large bodies there are, the small ones of others find room.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    @classmethod
    def for_bodies_of(cls, max_body_bytes: int) -> "BodyMemory":
        """Eight bodies of that size, or a quarter of the machine's memory if that is less; but always one of them."""
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        wanted = min(_NUM_LARGEST * max_body_bytes, machine // _SHARE_OF_MACHINE)
        # of which a body that is alone may have half
        return cls(max(wanted, 2 * max_body_bytes))


class HeldBody:
    """One request's part of it."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._num_bytes = 0
        self.is_refused = False

    def hold(self, num_bytes: int) -> bool:
        """Have so many bytes more, if there is room; else the body is refused, for good."""
        memory = self._memory
        self.is_refused |= self._num_bytes + num_bytes > memory.max_bytes - memory.num_bytes - num_bytes
        if not self.is_refused:
            self._num_bytes += num_bytes
            memory.num_bytes += num_bytes
        return not self.is_refused

    def release(self) -> None:
        """The bytes are held no more, or not as a body."""
        self._memory.num_bytes -= self._num_bytes
        self._num_bytes = 0

    def check(self) -> None:
        """Raises Overloaded for a body that is not all there."""
        if self.is_refused:
            raise Overloaded(
                f"Request bodies that come in take {self._memory.num_bytes} bytes of memory already, which leaves no "
                "room for a body of this size. Please try again later.",
                retry_after=_RETRY_AFTER,
            )
