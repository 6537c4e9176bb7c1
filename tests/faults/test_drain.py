"""SIGTERM lets what runs finish, tells everybody else why not, and leaves nothing behind; so does a kill. Real
processes."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer, running_server
from tests.faults.clients import address, connect, fin, read_all, read_until, request_bytes
from tests.faults.facts import descendants, figures, wait_for
from tests.fetch.gguf_files import write_llama
from tests.server.live import HttpAnswer, parse_answer
from tests.supervisor.test_supervise import wait_until_gone

pytestmark = pytest.mark.slow

PATIENT = ("--drain-timeout", "60")
LONG = {"prompt": "abc", "max_tokens": 500, "ignore_eos": True, "seed": 3}
# nothing of it ends before the test does
ENDLESS = {**LONG, "max_tokens": 3000}


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode()


def ask(client: socket.socket, request: bytes) -> HttpAnswer:
    """The last answer on this connection: the server closes it."""
    client.sendall(request)
    answer = parse_answer(read_all(client))
    client.close()
    assert answer.headers["connection"] == "close"
    return answer


def events(stream: bytes) -> list[Any]:
    """The JSON of each event of a whole stream, which ends as it should."""
    lines = [line for line in stream.split(b"\r\n") if line.startswith(b"data: ")]
    *chunks, done = b"".join(lines).split(b"\n\n")[:-1]
    assert done == b"data: [DONE]"
    assert stream.endswith(b"0\r\n\r\n")
    return [json.loads(chunk.removeprefix(b"data: ")) for chunk in chunks]


def assert_refused(answer: HttpAnswer) -> None:
    assert answer.status == 503
    assert answer.headers["retry-after"]
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("server_error", None)
    assert "shutting down" in error["message"]


def test_a_drain_as_everybody_sees_it(tiny_model_dir: Path) -> None:
    with running_server("--model", str(tiny_model_dir), *PATIENT) as server, ExitStack() as clients:
        to, pids = address(server), descendants(server.process.pid)
        # the supervisor says so a moment before the server knows
        wait_for(lambda: probe(to, "/health"), lambda answer: answer.status == 200)
        runs, leaves, idle, fresh = (clients.enter_context(connect(to)) for _ in range(4))
        idle.sendall(get("/health"))
        read_until(idle, b'"status":"ok"')
        runs.sendall(request_bytes({**LONG, "stream": True}))
        leaves.sendall(request_bytes({**LONG, "n": 2}))
        beginning = read_until(runs, b"data: ")
        wait_for(lambda: figures(server), lambda now: now.num_running + now.num_waiting == 3)
        # the drain cannot end while we look at it
        worker = server.child_pids()["llmd.worker"]
        os.kill(worker, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)

        server.wait_log("draining", occurrences=1)
        probed = wait_for(lambda: probe(to, "/health"), lambda answer: answer.json()["status"] != "ok")
        assert (probed.status, probed.json()["status"]) == (503, "draining")
        assert probed.headers["retry-after"]
        assert probe(to, "/health/ready").status == 503
        assert probe(to, "/health/live").status == 200
        for client in (idle, fresh, connect(to)):
            assert_refused(ask(client, request_bytes({**LONG, "stream": client is fresh})))
        fin(leaves)
        assert wait_for(lambda: figures(server), lambda now: now.num_aborted == 2).num_ended == 2

        os.kill(worker, signal.SIGCONT)
        streamed = events((beginning + read_all(runs)).partition(b"\r\n\r\n")[2])
        assert not [event for event in streamed if "error" in event]
        assert streamed[-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(START_TIMEOUT) == 0
        wait_until_gone(pids)
        with pytest.raises(ConnectionRefusedError):
            connect(to)


def probe(to: tuple[str, int], path: str) -> HttpAnswer:
    client = connect(to)
    client.sendall(get(path))
    answer = parse_answer(read_until(client, b"}"))
    client.close()
    return answer


def test_what_takes_too_long_ends_with_an_error(long_model_dir: Path) -> None:
    """What streams, what waits for its answer and what waits in the queue; and a client that does not read."""
    arguments = ("--max-num-seqs", "5", "--drain-timeout", "1", "--api-server-count", "2")
    with running_server("--model", str(long_model_dir), *arguments) as server, ExitStack() as clients:
        to, pids = address(server), descendants(server.process.pid)
        # of two servers the second may be ready later
        for _ in range(10):
            wait_for(lambda: probe(to, "/health"), lambda answer: answer.status == 200)
        streaming, waiting, queued, unread = (
            [clients.enter_context(connect(to)) for _ in range(number)] for number in (2, 2, 2, 1)
        )
        for client in (*streaming, *unread):
            client.sendall(request_bytes({**ENDLESS, "stream": True}))
        beginnings = [read_until(client, b"data: ") for client in streaming]
        for client in waiting:
            client.sendall(request_bytes(ENDLESS))
        wait_for(lambda: figures(server), lambda now: now.num_running == 5)
        for client in queued:
            client.sendall(request_bytes({**ENDLESS, "stream": True}))
            read_until(client, b"\r\n\r\n")
        # of a stopped engine nothing more comes
        os.kill(server.child_pids()["llmd.worker"], signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        for beginning, client in zip(beginnings, streaming, strict=True):
            *_, last = events((beginning + read_all(client)).partition(b"\r\n\r\n")[2])
            assert "shutting down" in last["error"]["message"]
        for client in waiting:
            assert_refused(parse_answer(read_all(client)))
        for client in queued:
            (last,) = events(read_all(client))
            assert last["error"]["type"] == "server_error"
        assert server.process.wait(START_TIMEOUT) == 0
        wait_until_gone(pids)


def test_a_drain_while_the_engine_is_restarted(tiny_model_dir: Path) -> None:
    with running_server("--model", str(tiny_model_dir), *PATIENT) as server:
        with connect(address(server)) as client:
            client.sendall(request_bytes(LONG))
            wait_for(lambda: figures(server), lambda now: now.num_running == 1)
            os.kill(server.child_pids()["llmd.worker"], signal.SIGKILL)
            server.wait_log("ended", occurrences=1)
            server.process.send_signal(signal.SIGTERM)
            answer = ask(client, b"")
        assert answer.status == 200
        assert answer.json()["usage"]["completion_tokens"] == 500
        assert server.process.wait(START_TIMEOUT) == 0


@pytest.fixture
def temporary(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment whose temporary files are ours to look at; at the end there are none."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    yield {**os.environ, "TMPDIR": str(folder)}
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("log", ["unix:", "importing torch", "ready after"])
def test_sigterm_at_any_stage_of_the_start(
    tiny_model_dir: Path, tmp_path: Path, temporary: dict[str, str], log: str
) -> None:
    path = tmp_path / "server.sock"
    arguments = ("--model", str(tiny_model_dir), "--uds", str(path))
    with running_server(*arguments, until=log, environment=temporary) as server:
        assert path.exists()
        pids = descendants(server.process.pid)
        # nobody waits for an answer, so it does not take the drain timeout
        assert server.stop() == 0
        wait_until_gone(pids)
    assert not path.exists()
    assert "Traceback" not in "".join(server.log)


@pytest.fixture
def converting(tmp_path: Path, temporary: dict[str, str]) -> Iterator[RunningServer]:
    """A server whose model is being converted; it takes longer than anybody waits."""
    embedding = np.zeros((400_000, 144), dtype=np.uint8)
    write_llama(tmp_path / "m.gguf", extra_tensors={"token_embd.weight": (embedding, GGMLQuantizationType.Q4_0)})
    arguments = ("--model", str(tmp_path / "m.gguf"), "--download-dir", str(tmp_path / "cache"))
    with running_server(*arguments, until="converting the weights", environment=temporary) as server:
        yield server


def test_sigterm_while_the_model_is_converted(converting: RunningServer) -> None:
    pids = descendants(converting.process.pid)
    assert "llmd.fetch" in converting.child_pids()
    assert converting.stop() == 0
    wait_until_gone(pids)
    assert "Traceback" not in "".join(converting.log)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_download(tmp_path: Path, end: signal.Signals) -> None:
    """Not the program that downloads either, a child of our child."""
    with socket.create_server(("127.0.0.1", 0)) as index:
        # it takes connections and never answers
        url = "http://{}:{}/simple".format(*index.getsockname())
        environment = {**os.environ, "PIP_INDEX_URL": url, "PIP_EXTRA_INDEX_URL": "", "PIP_CONFIG_FILE": os.devnull}
        arguments = ("--download-dir", str(tmp_path))
        with running_server(*arguments, until="downloading the demo", environment=environment) as server:
            index.accept()[0].close()
            pids = descendants(server.process.pid)
            assert len(pids) == 3, "a server, a fetcher and its pip"
            server.process.send_signal(end)
            assert server.process.wait(START_TIMEOUT) == (0 if end == signal.SIGTERM else -signal.SIGKILL)
            wait_until_gone(pids)
