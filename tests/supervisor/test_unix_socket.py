"""The socket of `--uds`: what may lie at its path, who may use it, and what is left when the server ends."""

import fcntl
import os
import signal
import socket
import stat
import time
from pathlib import Path

import httpx
import pytest

from llmd.errors import StartupFailed
from llmd.supervisor.unix_socket import listening_unix_socket
from tests.end_to_end.running_server import START_TIMEOUT, running_server
from tests.supervisor.test_supervise import wait_until_gone


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "llmd.sock"


def leave_stale(path: Path) -> None:
    """What a killed server leaves."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()


def can_connect(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def test_it_listens_for_its_owner_and_leaves_nothing(path: Path) -> None:
    with listening_unix_socket(path):
        assert can_connect(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()
    assert list(path.parent.iterdir()) == []


def test_the_file_of_a_dead_server_is_replaced(path: Path) -> None:
    leave_stale(path)
    assert path.exists()
    assert not can_connect(path)
    with listening_unix_socket(path):
        assert can_connect(path)


@pytest.mark.parametrize("backlog", [128, 0])
def test_a_live_server_is_left_alone(path: Path, backlog: int) -> None:
    with socket.socket(socket.AF_UNIX) as live, socket.socket(socket.AF_UNIX) as first:
        live.bind(str(path))
        live.listen(backlog)
        # with no backlog, this one fills the queue
        first.connect(str(path))
        with pytest.raises(StartupFailed, match="a server listens there"), listening_unix_socket(path):
            pass
        assert path.exists()


def test_the_second_of_two_servers_is_refused(path: Path) -> None:
    with listening_unix_socket(path):
        with pytest.raises(StartupFailed, match=r"llmd\.sock: a server listens there"), listening_unix_socket(path):
            pass
        assert can_connect(path)


def test_what_is_not_a_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(StartupFailed, match="not a socket"), listening_unix_socket(path):
        pass
    assert path.read_text() == "precious"
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(StartupFailed, match="not a socket"), listening_unix_socket(link):
        pass


def test_a_path_that_cannot_be_is_explained(tmp_path: Path) -> None:
    for path, reason in [(tmp_path / "missing" / "s", "No such file"), (tmp_path / ("s" * 200), "too long")]:
        with pytest.raises(StartupFailed, match=reason) as refused, listening_unix_socket(path):
            pass
        assert str(path) in str(refused.value)


def test_servers_that_start_at_once_do_not_take_one_anothers_socket(path: Path) -> None:
    leave_stale(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with pytest.raises(StartupFailed, match="try again"), listening_unix_socket(path):
            pass
    finally:
        os.close(folder)
    with listening_unix_socket(path):
        assert can_connect(path)


def test_another_ones_socket_is_not_removed(path: Path) -> None:
    with listening_unix_socket(path):
        path.unlink()
        leave_stale(path)
    assert path.exists()


@pytest.mark.slow
def test_the_whole_command_on_a_unix_socket(tiny_model_dir: Path, path: Path) -> None:
    key_file = path.with_name("keys")
    key_file.write_text("sk-one\n")
    leave_stale(path)
    arguments = ("--model", str(tiny_model_dir), "--uds", str(path), "--api-key-file", str(key_file))
    transport = httpx.HTTPTransport(uds=str(path))
    with (
        running_server(*arguments) as server,
        httpx.Client(transport=transport, base_url="http://llmd", timeout=START_TIMEOUT) as client,
    ):
        assert any(line.endswith(f"· unix:{path}") for line in server.log)
        assert server.url == ""  # no TCP port beside it
        # the log says it a moment before the server process hears of it
        deadline = time.monotonic() + START_TIMEOUT
        while client.get("/health").status_code != 200:
            assert time.monotonic() < deadline, server.log
        question = {"prompt": "abc", "max_tokens": 5, "ignore_eos": True}
        assert client.post("/v1/completions", json=question).status_code == 401
        key_file.write_text("sk-second\n")
        assert client.get("/v1/models", headers={"Authorization": "Bearer sk-one"}).status_code == 401
        client.headers["Authorization"] = "Bearer sk-second"
        answer = client.post("/v1/completions", json=question)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 5
        with client.stream("POST", "/v1/completions", json={**question, "stream": True}) as stream:
            assert list(stream.iter_lines())[-2] == "data: [DONE]"
        for pid in server.child_pids().values():
            assert b"sk-" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        # a server process that dies leaves the socket open
        pid = server.child_pids()["llmd.server"]
        os.kill(pid, signal.SIGKILL)
        wait_until_gone([pid])
        retrying = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=retrying, base_url="http://llmd", timeout=START_TIMEOUT) as again:
            assert again.get("/health/live").status_code == 200
        assert server.stop() == 0
        assert not path.exists()
        assert not any("sk-" in line for line in server.log)
