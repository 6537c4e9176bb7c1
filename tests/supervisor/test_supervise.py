"""The whole command as an operator and a kernel see it: starting, failing, losing children, stopping."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer, running_server
from tests.supervisor.streaming import LONG

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tiny_model_dir: Path) -> Iterator[RunningServer]:
    with running_server("--model", str(tiny_model_dir), "--drain-timeout", "60") as running:
        yield running


def completion(server: RunningServer, **parameters: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.base_url}/completions", json={**LONG, **parameters}, timeout=START_TIMEOUT)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def wait_until_gone(pids: list[int]) -> None:
    """Until none of the processes exists. A pidfd becomes readable when its process ends: no polling."""
    import select

    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([pidfd], [], [], START_TIMEOUT)[0], f"process {pid} is still there"
        finally:
            os.close(pidfd)


def test_the_processes_are_the_architecture(server: RunningServer) -> None:
    assert set(server.child_pids()) == {"llmd.server", "llmd.engine", "llmd.worker"}


def test_the_port_is_open_and_tells_the_truth_while_the_model_loads(tiny_model_dir: Path) -> None:
    # the first line of the log comes when the port is open; torch needs far longer than one request
    with running_server("--model", str(tiny_model_dir), until="http://") as loading:
        response = httpx.get(f"{loading.url}/health", timeout=START_TIMEOUT)
        assert response.status_code == 503
        assert response.json()["status"] in ("starting", "loading")
        refused = httpx.post(f"{loading.base_url}/completions", json=LONG)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["message"]


@pytest.mark.parametrize("victim", ["llmd.engine", "llmd.worker"])
def test_an_open_stream_survives_its_engine(server: RunningServer, victim: str) -> None:
    undisturbed = completion(server)
    pids = server.child_pids()
    text, killed = "", False
    body = {**LONG, "stream": True}
    with httpx.stream("POST", f"{server.base_url}/completions", json=body, timeout=START_TIMEOUT) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                if len(text) > 20 and not killed:
                    os.kill(pids[victim], signal.SIGKILL)
                    killed = True
    assert killed
    assert text == undisturbed["text"]
    # both were replaced, the server was not
    after = server.child_pids()
    assert after["llmd.engine"] != pids["llmd.engine"]
    assert after["llmd.worker"] != pids["llmd.worker"]
    assert after["llmd.server"] == pids["llmd.server"]
    health = httpx.get(f"{server.url}/health").json()
    assert health["restarts"] == 1


def test_a_server_that_dies_is_replaced_and_the_port_stays_open(server: RunningServer) -> None:
    os.kill(server.child_pids()["llmd.server"], signal.SIGKILL)
    # the connection waits in the backlog of the socket that the supervisor holds
    transport = httpx.HTTPTransport(retries=0)
    with httpx.Client(transport=transport, timeout=START_TIMEOUT) as client:
        while client.get(f"{server.url}/health").status_code != 200:
            pass
    assert completion(server, max_tokens=3)["text"]


def test_sigterm_lets_running_requests_finish(server: RunningServer) -> None:
    undisturbed = completion(server)
    children = list(server.child_pids().values())
    text = ""
    body = {**LONG, "stream": True}
    with httpx.stream("POST", f"{server.base_url}/completions", json=body, timeout=START_TIMEOUT) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                if not text:
                    server.process.send_signal(signal.SIGTERM)
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert text == undisturbed["text"]
    assert server.process.wait(START_TIMEOUT) == 0
    wait_until_gone(children)


def test_the_second_signal_ends_at_once(server: RunningServer) -> None:
    children = list(server.child_pids().values())
    body = {**LONG, "stream": True}
    with httpx.stream("POST", f"{server.base_url}/completions", json=body, timeout=START_TIMEOUT) as response:
        next(response.iter_lines())
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(START_TIMEOUT) == 0
    wait_until_gone(children)


def test_nothing_survives_the_supervisor(server: RunningServer) -> None:
    children = list(server.child_pids().values())
    server.process.kill()
    wait_until_gone([server.process.pid, *children])


def serve_and_fail(*arguments: str) -> tuple[int, str]:
    finished = subprocess.run(
        [sys.executable, "-m", "llmd", "serve", *arguments], capture_output=True, text=True, timeout=START_TIMEOUT
    )
    return finished.returncode, finished.stderr


def test_what_cannot_start_says_why(tmp_path: Path, tiny_model_dir: Path, server: RunningServer) -> None:
    status, log = serve_and_fail("--model", str(tmp_path / "nothing"), "--port", "0")
    assert status == 1
    assert "There is no model at" in log

    strange = tmp_path / "strange"
    strange.mkdir()
    for file in tiny_model_dir.iterdir():
        (strange / file.name).write_bytes(file.read_bytes())
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "architectures": ["WonderForCausalLM"]}))
    status, log = serve_and_fail("--model", str(strange), "--port", "0")
    assert status == 1
    assert "WonderForCausalLM is not supported" in log

    status, log = serve_and_fail("--model", str(tiny_model_dir), "--port", server.url.rpartition(":")[2])
    assert status == 1
    assert "taken" in log
    assert "Traceback" not in log
