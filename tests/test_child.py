"""The first thing that every child process does: real processes and sockets, nothing waits."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from llmd.child import ControlChannel, connect_control
from llmd.config import FetchConfig, ModelConfig
from llmd.protocol.control import (
    BEAT_INTERVAL,
    Beat,
    ChildProgress,
    ChildReady,
    ChildToSupervisor,
    Line,
    Stage,
    SystemState,
)
from llmd.protocol.framing import FrameDecoder, encode_frame

CONFIG = FetchConfig(model=ModelConfig(cache_dir="/nowhere", served_names=("demo",)))


@pytest.fixture
def supervisor_end() -> Iterator[tuple[socket.socket, int]]:
    ours, theirs = socket.socketpair()
    # a child ignores these, and whatever pytest starts after it would do so too
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with ours:
        yield ours, theirs.detach()
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def stay_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests play the child inside pytest, which must not take over a child's ties to its parent."""
    monkeypatch.setattr("llmd.child.die_with_parent", lambda: None)


def test_the_configuration_is_the_first_frame_and_the_states_follow(supervisor_end: tuple[socket.socket, int]) -> None:
    ours, fd = supervisor_end
    states = [SystemState(stage=Stage.LOADING, progress=0.5), SystemState(stage=Stage.READY)]
    # all in one write: what came in behind the configuration must not be lost
    ours.sendall(encode_frame(CONFIG) + encode_frame(states[0]) + encode_frame(states[1]))
    config, control = connect_control(fd, FetchConfig)
    assert config == CONFIG
    ours.shutdown(socket.SHUT_WR)

    async def read_states() -> list[SystemState | None]:
        return [await control.wait_state() for _ in range(3)]

    assert trio.run(read_states) == [*states, None]


def test_a_child_reports_to_the_supervisor(supervisor_end: tuple[socket.socket, int]) -> None:
    ours, fd = supervisor_end
    ours.sendall(encode_frame(CONFIG))
    _, control = connect_control(fd, FetchConfig)
    messages: list[ChildToSupervisor] = [ChildProgress(stage=Stage.LOADING), ChildReady(model_dir="/model")]
    for message in messages:
        control.send(message)
    decoder: FrameDecoder[ChildToSupervisor] = FrameDecoder(ChildToSupervisor)
    assert list(decoder.feed(ours.recv(1 << 16))) == messages


def test_an_event_loop_gives_signs_of_life(supervisor_end: tuple[socket.socket, int]) -> None:
    ours, fd = supervisor_end
    ours.sendall(encode_frame(CONFIG))
    _, control = connect_control(fd, FetchConfig)

    async def live() -> None:
        with trio.move_on_after(9.5 * BEAT_INTERVAL):
            await control.beat_in_loop()
            raise AssertionError("it ended by itself")

    trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))
    decoder: FrameDecoder[ChildToSupervisor] = FrameDecoder(ChildToSupervisor)
    assert list(decoder.feed(ours.recv(1 << 16))) == [Beat()] * 10
    # without a supervisor it ends, and leaves the rest to who waits for that
    ours.close()
    trio.run(control.beat_in_loop)


def test_threads_do_not_tear_one_anothers_messages(supervisor_end: tuple[socket.socket, int]) -> None:
    ours, fd = supervisor_end
    ours.sendall(encode_frame(CONFIG))
    _, control = connect_control(fd, FetchConfig)
    # far more than the socket holds, so that senders wait in the middle of a message
    messages = [Line(str(number) * 100_000) for number in range(4)]
    threads = [threading.Thread(target=control.send, args=(message,)) for message in messages]
    for thread in threads:
        thread.start()
    decoder: FrameDecoder[ChildToSupervisor] = FrameDecoder(ChildToSupervisor)
    received: list[ChildToSupervisor] = []
    while len(received) < len(messages):
        received += decoder.feed(ours.recv(1 << 16))
    assert sorted(received, key=messages.index) == messages
    for thread in threads:
        thread.join()


def test_a_supervisor_that_is_gone_at_once_is_an_error(supervisor_end: tuple[socket.socket, int]) -> None:
    ours, fd = supervisor_end
    ours.close()
    with pytest.raises(ConnectionError, match="before it sent the configuration"):
        connect_control(fd, FetchConfig)


def test_ctrl_c_is_left_to_the_supervisor(supervisor_end: tuple[socket.socket, int]) -> None:
    ours, fd = supervisor_end
    ours.sendall(encode_frame(CONFIG))
    connect_control(fd, FetchConfig)
    os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_waiting_until_closed_drops_what_still_comes(supervisor_end: tuple[socket.socket, int]) -> None:
    ours, fd = supervisor_end
    ours.sendall(encode_frame(SystemState(stage=Stage.READY)))

    async def wait() -> None:
        channel = ControlChannel(theirs)
        # the message alone is not the end
        with trio.move_on_after(0.05) as still_open:
            await channel.wait_closed()
        assert still_open.cancelled_caught
        ours.close()
        with trio.fail_after(10):
            await channel.wait_closed()

    with socket.socket(fileno=fd) as theirs:
        trio.run(wait)


def test_a_child_does_not_outlive_its_parent() -> None:
    grandchild = (
        "import time\n"
        "from llmd.child import die_with_parent\n"
        "die_with_parent()\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {grandchild!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.read(2)\n"
        "os._exit(0)\n"
    )
    # the grandchild holds the parent's stderr: its end is the grandchild's death
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=30)
    assert errors == b""
    assert process.returncode == 0
