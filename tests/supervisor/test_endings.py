"""When there is nothing more to try, and when the operator wants an end: told truthfully, and soon over."""

import os
import shutil
import signal
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer, running_server
from tests.supervisor.streaming import LONG, pids, streamed
from tests.supervisor.test_supervise import wait_until_gone

pytestmark = pytest.mark.slow


def end_and_expect_nothing_left(server: RunningServer, *, status: int = 0) -> None:
    children = list(server.child_pids().values())
    assert server.stop() == status
    wait_until_gone(children)


def test_a_model_that_is_gone_is_told_to_everybody(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    with running_server("--model", str(folder)) as server:

        def take_away(_: int) -> None:
            folder.rename(tmp_path / "elsewhere")
            os.kill(pids(server, "llmd.worker")[0], signal.SIGKILL)

        text, errors = streamed(server, take_away)
        assert text
        assert len(errors) == 1
        assert "The engine has failed" in errors[0]["message"]
        # tried three times, with time between
        assert sum("gave up" in line for line in server.log) == 2
        # the servers stay and say why
        health = httpx.get(f"{server.url}/health", timeout=START_TIMEOUT)
        assert health.status_code == 503
        assert health.json()["status"] == "failed"
        assert str(folder) in health.json()["detail"]
        refused = httpx.post(f"{server.base_url}/completions", json=LONG, timeout=START_TIMEOUT)
        assert refused.status_code == 503
        assert str(folder) in refused.json()["error"]["message"]
        # so does a server that starts only now, without a model to read
        (pid,) = pids(server, "llmd.server")
        os.kill(pid, signal.SIGKILL)
        wait_until_gone([pid])
        health = httpx.get(f"{server.url}/health", timeout=START_TIMEOUT)
        while health.json()["status"] == "starting":
            health = httpx.get(f"{server.url}/health", timeout=START_TIMEOUT)
        assert health.json()["status"] == "failed"
        end_and_expect_nothing_left(server)


def test_sigterm_while_it_loads(tiny_model_dir: Path) -> None:
    with running_server("--model", str(tiny_model_dir), until="importing torch") as server:
        end_and_expect_nothing_left(server)


def test_sigterm_while_it_restarts(tiny_model_dir: Path) -> None:
    with running_server("--model", str(tiny_model_dir)) as server:
        os.kill(pids(server, "llmd.engine")[0], signal.SIGKILL)
        server.wait_log("importing torch", occurrences=2)
        end_and_expect_nothing_left(server)


def test_a_second_sigterm_while_a_stopped_worker_holds_up_the_first(tiny_model_dir: Path) -> None:
    with running_server("--model", str(tiny_model_dir)) as server:
        children = list(server.child_pids().values())

        def end_twice(_: int) -> None:
            os.kill(pids(server, "llmd.worker")[0], signal.SIGSTOP)
            server.process.send_signal(signal.SIGTERM)
            server.wait_log("draining", occurrences=1)
            server.process.send_signal(signal.SIGTERM)

        with pytest.raises(httpx.RemoteProtocolError):
            streamed(server, end_twice)
        assert server.process.wait(START_TIMEOUT) == 0
        wait_until_gone(children)
