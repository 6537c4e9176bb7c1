"""Writes lines to a file descriptor without ever waiting for whoever reads it. Knows nothing of what they say."""

import os
import select
import stat
import time
from contextlib import suppress

# bytes that wait for a reader that stalls; more is not kept
MAX_PENDING = 1 << 18


class LineWriter:
    """Lines go out at once, in order. While the reader of a pipe, socket or terminal stalls, some are kept: they go out
    with the next line after that, or with `flush`."""

    def __init__(self, fd: int) -> None:
        self._fd = _without_waiting(fd)
        self._may_wait = _may_wait(self._fd)
        self._pending = bytearray()

    def write(self, line: str) -> bool:
        """Take in one line, without its line end. False if so much is kept already that it has to be dropped."""
        data = line.encode(errors="backslashreplace") + b"\n"
        self.flush()
        if self._pending and len(self._pending) + len(data) > MAX_PENDING:
            return False
        self._pending += data
        self.flush()
        return True

    def flush(self, *, patience: float = 0) -> None:
        """Write of what is kept as much as the reader has room for within `patience` seconds."""
        deadline = time.monotonic() + patience
        while self._pending and takes_bytes(self._fd, within=max(0, deadline - time.monotonic())):
            # a descriptor that can make us wait takes so much and does not, once it is said to be ready
            size = select.PIPE_BUF if self._may_wait else len(self._pending)
            try:
                num_written = os.write(self._fd, self._pending[:size])
            except BlockingIOError:
                return
            except OSError:
                # nobody reads any more
                num_written = len(self._pending)
            del self._pending[:num_written]


def takes_bytes(fd: int, *, within: float = 0) -> bool:
    """Whether, after so many seconds at most, a write of up to PIPE_BUF bytes goes through or fails at once."""
    ready = select.poll()
    ready.register(fd, select.POLLOUT)
    return bool(ready.poll(1000 * within))


def _without_waiting(fd: int) -> int:
    """The same file, opened anew so that writing never waits; or the same descriptor, where that cannot be.

    Setting O_NONBLOCK on the descriptor itself would set it for all processes that share it. Without it, another
    process may fill the pipe between our look and our write.
    """
    with suppress(OSError):
        if stat.S_ISFIFO(os.fstat(fd).st_mode) or os.isatty(fd):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return fd


def _may_wait(fd: int) -> bool:
    try:
        return os.get_blocking(fd) and not stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False
