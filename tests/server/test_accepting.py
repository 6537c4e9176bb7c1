"""Taking connections where files run out: said once in a while, and over as soon as there is room again."""

import errno
import logging
import os
import re

import pytest
import trio
from trio.testing import MockClock, trio_test

from llmd.server.accepting import MIN_BETWEEN_COMPLAINTS, accept_connections


class FullListener(trio.abc.Listener[trio.SocketStream]):
    """Has no room for so many seconds; then come two connections, and no more."""

    def __init__(self, seconds: float, *, error: int) -> None:
        self.full_until = trio.current_time() + seconds
        self.error = error
        self.num_left = 2
        self.num_failures = 0

    async def accept(self) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        if trio.current_time() < self.full_until:
            self.num_failures += 1
            raise OSError(self.error, os.strerror(self.error))
        if self.num_left == 0:
            await trio.sleep_forever()
        self.num_left -= 1
        return trio.SocketStream(trio.socket.socket())

    async def aclose(self) -> None:
        pass


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


@pytest.mark.parametrize(
    ("error", "said"),
    [(errno.EMFILE, r"too many open files: \d+ .*ulimit -n"), (errno.ENFILE, "too many open files in system")],
)
@trio_test
async def test_no_room_is_said_once_a_minute(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, error: int, said: str
) -> None:
    """A trace every 0.1 s filled the log faster than anything else."""
    listener = FullListener(2.5 * MIN_BETWEEN_COMPLAINTS, error=error)
    served = []

    async def serve(stream: trio.SocketStream) -> None:
        stream.socket.close()
        served.append(stream)

    with caplog.at_level(logging.INFO):
        async with trio.open_nursery() as nursery:
            await nursery.start(accept_connections, [listener], serve)
            await trio.sleep(3 * MIN_BETWEEN_COMPLAINTS)
            nursery.cancel_scope.cancel()
    # it waits in between, and goes on afterwards
    assert 100 < listener.num_failures < 3000
    assert len(served) == 2
    assert len(caplog.records) == 3
    for record in caplog.records:
        assert re.search(said, record.getMessage())
        assert record.exc_info is None
