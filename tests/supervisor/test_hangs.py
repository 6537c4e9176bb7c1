"""Processes that exist and do nothing: real ones, stopped by a signal. Whoever has a request open sees a pause."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer, running_server
from tests.supervisor.streaming import completion, pids, streamed

pytestmark = pytest.mark.slow

HANG_TIMEOUT = 2  # seconds


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[RunningServer]:
    arguments = ("--hang-timeout", str(HANG_TIMEOUT), "--api-server-count", "2")
    with running_server("--model", str(tiny_model_dir), *arguments) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(server: RunningServer) -> str:
    return completion(server)


def restarts(server: RunningServer) -> int:
    number: int = httpx.get(f"{server.url}/health", timeout=START_TIMEOUT).json()["restarts"]
    return number


def test_ready_is_said_when_every_server_process_says_so(server: RunningServer) -> None:
    # each request on a connection of its own, so that both processes are asked
    assert {httpx.get(f"{server.url}/health", timeout=START_TIMEOUT).status_code for _ in range(20)} == {200}


@pytest.mark.parametrize("victim", ["worker", "engine"])
def test_a_stream_survives_a_hang(server: RunningServer, undisturbed: str, victim: str) -> None:
    (pid,) = pids(server, f"llmd.{victim}")
    before = restarts(server)
    assert streamed(server, lambda _: os.kill(pid, signal.SIGSTOP)) == (undisturbed, [])
    server.wait_log(f"{victim} {pid} has given no sign of life for {HANG_TIMEOUT} s: replacing it", occurrences=1)
    assert restarts(server) == before + 1


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_is_lost_does_not_disturb_the_other(
    server: RunningServer, undisturbed: str, blow: signal.Signals
) -> None:
    lost: list[int] = []

    def lose_the_other(streaming: int) -> None:
        lost.extend(pid for pid in pids(server, "llmd.server") if pid != streaming)
        os.kill(lost[0], blow)
        # the port stays open, and new connections come to those who take them
        assert completion(server, max_tokens=3)

    before = restarts(server)
    assert streamed(server, lose_the_other) == (undisturbed, [])
    server.wait_log(f"server {lost[0]} was ended by SIGKILL: starting another server", occurrences=1)
    while len(pids(server, "llmd.server")) < 2:
        pass
    assert lost[0] not in pids(server, "llmd.server")
    assert restarts(server) == before
    assert completion(server) == undisturbed


def test_who_is_paused_with_everybody_else_is_not_replaced(server: RunningServer, undisturbed: str) -> None:
    before = pids(server, "llmd.server"), pids(server, "llmd.engine"), pids(server, "llmd.worker")
    num_lines = len(server.log)

    def pause(_: int) -> None:
        os.killpg(server.process.pid, signal.SIGSTOP)
        # time is what this is about: longer than any of them may be silent
        time.sleep(HANG_TIMEOUT * 2)
        os.killpg(server.process.pid, signal.SIGCONT)

    assert streamed(server, pause) == (undisturbed, [])
    assert (pids(server, "llmd.server"), pids(server, "llmd.engine"), pids(server, "llmd.worker")) == before
    assert server.log[num_lines:] == []
