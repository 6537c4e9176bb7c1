"""One child under watch: a real process with a real socket, and a clock that the test moves."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from llmd.config import FetchConfig, ModelConfig
from llmd.protocol.control import (
    BEAT_INTERVAL,
    Beat,
    ChildFailed,
    ChildReady,
    ChildToSupervisor,
    Line,
    Stage,
    SystemState,
)
from llmd.protocol.framing import encode_frame
from llmd.supervisor.processes import Process
from llmd.supervisor.watch import Child, how_ended

HANG_TIMEOUT = 10.0
CONFIG = FetchConfig(model=ModelConfig(cache_dir="/nowhere", served_names=("demo",)))


class Watched:
    """A process that sleeps, the test that speaks for it, and what the supervisor hears."""

    def __init__(self) -> None:
        ours, self.voice = socket.socketpair()
        self.process = Process("worker", subprocess.Popen(["sleep", "1000"]), ours)
        self.heard: list[ChildToSupervisor] = []
        self.lines: list[str] = []
        self.suspicions: list[bool] = []
        self.clock = trio.testing.MockClock()

    @property
    def is_alive(self) -> bool:
        return self.process.popen.returncode is None

    def run(self, story: Callable[[], Awaitable[None]]) -> None:
        """Watch the process while the story goes on."""

        async def watch() -> None:
            child = Child(
                self.process,
                self.heard.append,
                hang_timeout=HANG_TIMEOUT,
                report=self.lines.append,
                suspect=self.suspicions.append,
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child.run)
                await trio.testing.wait_all_tasks_blocked()
                await story()
                nursery.cancel_scope.cancel()

        trio.run(watch, clock=self.clock)

    async def say(self, message: ChildToSupervisor) -> None:
        self.voice.sendall(encode_frame(message))
        # the watch reads it before anything else happens
        await trio.testing.wait_all_tasks_blocked(0.01)

    async def pass_time(self, num_beats: int) -> None:
        for _ in range(num_beats):
            self.clock.jump(BEAT_INTERVAL)
            await trio.testing.wait_all_tasks_blocked()


@pytest.fixture
def watched() -> Iterator[Watched]:
    child = Watched()
    with child.voice:
        yield child
    assert child.process.popen.returncode is not None


def test_silence_ends_a_child_and_beats_keep_it(watched: Watched) -> None:
    async def story() -> None:
        await watched.say(ChildReady())
        for _ in range(5):
            await watched.pass_time(4)
            await watched.say(Beat())
        assert watched.suspicions == []
        await watched.pass_time(9)
        assert watched.suspicions == [True]
        await watched.say(Beat())
        await watched.pass_time(1)
        assert watched.suspicions == [True, False]
        assert watched.lines == []
        await watched.pass_time(10)
        pid = watched.process.popen.pid
        assert watched.lines == [f"worker {pid} has given no sign of life for 10 s: replacing it"]
        # the end of the story would send SIGKILL, which overtakes what a busy machine has not delivered yet
        watched.process.popen.wait(60)

    watched.run(story)
    assert watched.heard == [ChildReady()]
    assert watched.process.popen.returncode == -signal.SIGABRT


def test_a_child_that_loads_may_be_silent_for_longer(watched: Watched) -> None:
    async def story() -> None:
        await watched.say(Line("loading"))
        await watched.pass_time(55)
        assert watched.lines == []
        await watched.pass_time(6)
        assert len(watched.lines) == 1

    watched.run(story)


def test_a_machine_that_slept_ends_nobody(watched: Watched) -> None:
    async def story() -> None:
        await watched.say(ChildReady())
        watched.clock.jump(1000 * HANG_TIMEOUT)
        await trio.testing.wait_all_tasks_blocked()
        assert watched.suspicions == []

    watched.run(story)
    assert watched.lines == []


def test_the_last_words_of_a_child_that_is_ended_are_heard(watched: Watched) -> None:
    async def story() -> None:
        # nobody reads this before the watch is cancelled
        watched.voice.sendall(encode_frame(ChildFailed("no disk")))

    watched.run(story)
    assert watched.heard == [ChildFailed("no disk")]
    assert how_ended(watched.process) == f"worker {watched.process.popen.pid} was ended by SIGKILL"
    assert how_ended(watched.process, reason="no disk").endswith("gave up: no disk")


def test_a_child_that_is_reaped_is_gone_for_who_tells_it_something(watched: Watched) -> None:
    async def tell() -> None:
        child = Child(watched.process, watched.heard.append, hang_timeout=HANG_TIMEOUT, report=watched.lines.append)
        watched.voice.close()
        await child.run()
        with pytest.raises(trio.BrokenResourceError):
            await child.tell(SystemState(stage=Stage.READY))

    trio.run(tell)


def child_process(code: str, stderr: Path) -> Process:
    """A process of ours that runs `code` with its `control`."""
    ours, theirs = socket.socketpair()
    program = (
        "import sys, time\n"
        "from llmd.child import connect_control\n"
        "from llmd.config import FetchConfig\n"
        "_, control = connect_control(int(sys.argv[1]), FetchConfig)\n"
    )
    with theirs, stderr.open("w") as file:
        popen = subprocess.Popen(
            [sys.executable, "-c", program + code, str(theirs.fileno())], pass_fds=(theirs.fileno(),), stderr=file
        )
    ours.sendall(encode_frame(CONFIG))
    return Process("fetch", popen, ours)


def test_a_child_that_hangs_prints_where(tmp_path: Path) -> None:
    code = "def stuck():\n    while True:\n        time.sleep(1)\nstuck()\n"
    process = child_process(code, tmp_path / "errors")
    lines: list[str] = []

    async def watch() -> None:
        with trio.fail_after(60):
            # until it is ready it may be silent for six times as long
            await Child(process, lambda _: None, hang_timeout=0.4, report=lines.append).run()

    trio.run(watch)
    assert len(lines) == 1
    assert how_ended(process) == f"fetch {process.popen.pid} was ended by SIGABRT"
    assert "in stuck" in (tmp_path / "errors").read_text()


def test_a_child_that_ends_by_itself_keeps_its_status(tmp_path: Path) -> None:
    # between the end of the socket and that of the process, an interpreter still tidies up
    code = "import os\ncontrol._connection.close()\ntime.sleep(0.1)\nos._exit(3)\n"
    process = child_process(code, tmp_path / "errors")

    async def watch() -> None:
        with trio.fail_after(60):
            await Child(process, lambda _: None, hang_timeout=10, report=print).run()

    trio.run(watch)
    assert how_ended(process) == f"fetch {process.popen.pid} ended with status 3"


def test_a_child_whose_supervisor_is_stuck_goes_on_and_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import llmd.child\n"
        "llmd.child.BEAT_INTERVAL = 0\n"
        "control.beat_in_thread()\n"
        "time.sleep(0.5)\n"
        "print('works', flush=True, file=sys.stderr)\n"
        "time.sleep(1000)\n"
    )
    process = child_process(code, tmp_path / "errors")
    # nobody reads what it says, and yet it comes to its line
    while not (tmp_path / "errors").read_text().endswith(os.linesep):
        assert process.popen.poll() is None
    assert (tmp_path / "errors").read_text() == f"works{os.linesep}"
    process.control.close()
    assert process.popen.wait(60) == 1
