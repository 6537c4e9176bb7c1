"""Several server processes on one port, as an operator sees them: real processes, stopped and killed."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from llmd.cli.flags import build_parser
from llmd.cli.samples import Samples, parse_samples
from llmd.cli.status import status
from llmd.protocol.figures import ServerFigures
from tests.end_to_end.running_server import START_TIMEOUT, RunningServer, running_server

pytestmark = pytest.mark.slow

ENDED = "vllm:request_success_total"


def server_pids(server: RunningServer) -> list[int]:
    """In the order of their start."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in children}
    return sorted(pid for pid, command in commands.items() if "llmd.server" in command)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """While it is stopped, another one takes the connections."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def complete(server: RunningServer, *, times: int) -> None:
    body = {"prompt": "abc", "max_tokens": 2, "ignore_eos": True}
    for _ in range(times):
        # after a restart one server process may know of the new engine before the other does
        while (answer := httpx.post(f"{server.base_url}/completions", json=body, timeout=START_TIMEOUT)).is_error:
            assert answer.status_code == 503, answer.text


def metrics(server: RunningServer) -> Samples:
    return parse_samples(httpx.get(f"{server.url}/metrics", timeout=START_TIMEOUT).text)


def num_left(folder: Path) -> float:
    """Sequences that ended, as the server processes have left it."""
    total = 0.0
    for file in folder.glob("llmd-*/*.figures"):
        figures = msgspec.msgpack.decode(file.read_bytes(), type=ServerFigures)
        total += sum(s.value for family in figures.counted for s in family.samples if s.name == ENDED)
    return total


def wait_health(server: RunningServer, **expected: object) -> None:
    """Ask until /health says all of this."""
    while True:
        said = httpx.get(f"{server.url}/health", timeout=START_TIMEOUT).json()
        if expected.items() <= said.items():
            return


@pytest.fixture
def server(tmp_path: Path, tiny_model_dir: Path) -> Iterator[RunningServer]:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    arguments = ("--model", str(tiny_model_dir), "--api-server-count", "2")
    with running_server(*arguments, environment=environment) as running:
        yield running


def test_whoever_is_asked_says_the_sum_and_it_never_falls(
    server: RunningServer, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = server_pids(server)
    with stopped(first):
        wait_health(server, status="ok")
        complete(server, times=2)
        while num_left(tmp_path) < 2:
            metrics(server)
    with stopped(second):
        wait_health(server, status="ok")
        complete(server, times=3)
        found = metrics(server)
        assert found.total(ENDED) == 5
        for name in ("request_queue_time", "request_prefill_time", "request_inference_time", "time_to_first_token"):
            assert found.total(f"vllm:{name}_seconds_count") == 5
    while num_left(tmp_path) < 5:
        metrics(server)

    os.kill(second, signal.SIGKILL)
    while len(pids := server_pids(server)) < 2 or second in pids:
        assert metrics(server).total(ENDED) == 5
    # the replacement alone
    with stopped(first):
        assert metrics(server).total(ENDED) == 5

    wait_health(server, status="ok")
    assert status(build_parser().parse_args(["status", server.url, "--once"])) == 0
    shown = capsys.readouterr().out
    assert f"● ready · {tiny_model_dir.name} at {server.url}" in shown
    assert "2 server processes" in shown
    assert "0 stop · 5 length" in shown


def test_the_engines_counters_outlive_it(server: RunningServer) -> None:
    complete(server, times=2)
    steps = "vllm:iteration_tokens_total_count"
    # the engine says so now and then
    while (before := metrics(server)).total(steps) < 2 * 2:
        pass
    assert before.total("vllm:iteration_tokens_total_sum") >= 2 * (len("abc") + 1)
    os.kill(server.child_pids()["llmd.engine"], signal.SIGKILL)
    # from the first moment on; the one before it needs a look at the socket
    while httpx.get(f"{server.url}/health", timeout=START_TIMEOUT).status_code == 200:
        pass
    while (found := metrics(server)).total("llmd:stage", stage="ready") == 0:
        assert found.total(steps) >= before.total(steps)
        assert found.total("vllm:num_requests_running") == 0
    complete(server, times=1)
    while metrics(server).total(steps) <= before.total(steps):
        pass
    assert metrics(server).total("llmd:engine_restarts_total") == 1
