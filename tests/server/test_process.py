"""`python -m llmd.server` as the supervisor starts it: a real process, with a control socket and a listening one."""

import json
import math
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from llmd.config import HttpConfig, LogConfig, ModelConfig, ServerConfig
from llmd.protocol.control import Stage, SystemState
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.generation import EngineReady, FinishReason, GenerateRequest, ServerToEngine, StepEvents, TokenEvent

pytestmark = pytest.mark.slow

TIMEOUT = 30.0


@dataclass
class Child:
    process: subprocess.Popen[bytes]
    control: socket.socket
    engine: socket.socket  # listening
    url: str

    def tell(self, state: SystemState) -> None:
        self.control.sendall(encode_frame(state))

    def wait_health(self, status: str) -> httpx.Response:
        """Ask until /health says this."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            answer = httpx.get(f"{self.url}/health")
            if answer.json()["status"] == status:
                return answer
        raise AssertionError(f"/health never said {status!r}, but {answer.text}")


@contextmanager
def server_process(
    tmp_path: Path,
    *,
    drain_timeout: float = 10,
    otlp_traces_endpoint: str | None = None,
    log: LogConfig | None = None,
    program: Sequence[str] = ("-m", "llmd.server"),
    stderr: int | None = None,
) -> Iterator[Child]:
    ours, theirs = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    engine = socket.socket(socket.AF_UNIX)
    engine.bind(str(tmp_path / "engine.sock"))
    engine.listen()
    engine.settimeout(TIMEOUT)
    config = ServerConfig(
        model=ModelConfig(cache_dir=str(tmp_path), served_names=("tiny",)),
        http=HttpConfig(drain_timeout=drain_timeout, otlp_traces_endpoint=otlp_traces_endpoint),
        listen_fds=(listener.fileno(),),
        engine_path=str(tmp_path / "engine.sock"),
        log=log or LogConfig(),
    )
    with ours, listener, engine:
        ours.sendall(encode_frame(config))
        with theirs:
            process = subprocess.Popen(
                [sys.executable, *program, str(theirs.fileno())],
                pass_fds=(theirs.fileno(), listener.fileno()),
                stderr=stderr,
            )
        try:
            yield Child(process, ours, engine, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            process.kill()
            process.wait()


def test_from_nothing_to_an_answer_to_the_end(tmp_path: Path, tiny_model_dir: Path) -> None:
    with server_process(tmp_path) as child:
        # it answers while nothing is loaded and nobody has told it anything
        assert httpx.get(f"{child.url}/health", timeout=TIMEOUT).json()["status"] == "starting"
        child.tell(SystemState(stage=Stage.READY, model_dir=str(tiny_model_dir)))
        child.wait_health("loading")
        connection, _ = child.engine.accept()
        with connection:
            connection.settimeout(TIMEOUT)
            connection.sendall(
                encode_frame(EngineReady(max_model_len=512, block_size=16, num_blocks=64, vocab_size=264))
            )
            assert child.wait_health("ok").status_code == 200
            with httpx.stream(
                "POST",
                f"{child.url}/v1/completions",
                json={"prompt": "x", "max_tokens": 2, "stream": True},
                timeout=TIMEOUT,
            ) as answer:
                decoder: FrameDecoder[ServerToEngine] = FrameDecoder(ServerToEngine)
                (request,) = decoder.feed(connection.recv(1 << 16))
                assert isinstance(request, GenerateRequest)
                lines = answer.iter_lines()
                connection.sendall(
                    encode_frame(StepEvents(events=[TokenEvent(request_id=request.request_id, token_ids=[65])]))
                )
                first = next(line for line in lines if line)
                assert json.loads(first.removeprefix("data: "))["object"] == "text_completion"
                # an init system sends SIGTERM to everybody, but it is the supervisor who decides
                child.process.send_signal(signal.SIGTERM)
                # what runs goes on while it drains, and then the process ends by itself
                child.tell(SystemState(stage=Stage.DRAINING, model_dir=str(tiny_model_dir)))
                end = TokenEvent(request_id=request.request_id, token_ids=[66], finish=FinishReason.LENGTH)
                connection.sendall(encode_frame(StepEvents(events=[end])))
                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert child.process.wait(TIMEOUT) == 0


def test_a_drain_without_a_limit_is_a_drain(tmp_path: Path) -> None:
    with server_process(tmp_path, drain_timeout=math.inf) as child:
        child.tell(SystemState(stage=Stage.DRAINING))
        assert child.process.wait(TIMEOUT) == 0


def test_it_ends_with_its_supervisor(tmp_path: Path) -> None:
    with server_process(tmp_path) as child:
        assert httpx.get(f"{child.url}/health/live", timeout=TIMEOUT).status_code == 200
        child.control.close()
        assert child.process.wait(TIMEOUT) == 0


@pytest.mark.parametrize("requests", [False, True], ids=["as ever", "asked for"])
def test_its_log_withholds_what_exceptions_say(requests: bool, tmp_path: Path) -> None:
    """A route that fails with a part of the request in its exception's message."""
    program = (
        "from llmd.server import models\n"
        "def fail(name, *_): raise KeyError(name)\n"
        "models.check_model = fail\n"
        "from llmd.server.__main__ import main\n"
        "main()\n"
    )
    log = LogConfig(format="json", requests=requests)
    with server_process(tmp_path, log=log, program=("-c", program), stderr=subprocess.PIPE) as child:
        answer = httpx.get(f"{child.url}/v1/models/marker", headers={"X-Request-Id": "trace-1"}, timeout=TIMEOUT)
        assert answer.status_code == 500
        assert "marker" not in answer.text
        assert child.process.stderr is not None
        line = json.loads(child.process.stderr.readline())
        assert (line["process"], line["request_id"]) == ("server", "trace-1")
        assert "in fail" in line["exception"]
        assert ("marker" in json.dumps(line)) == requests


def test_who_takes_its_spans_and_says_nothing_holds_up_nobody(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    with socket.create_server(("127.0.0.1", 0)) as hole:
        endpoint = f"http://127.0.0.1:{hole.getsockname()[1]}"
        with server_process(tmp_path, otlp_traces_endpoint=endpoint) as child:
            for _ in range(3):
                assert httpx.post(f"{child.url}/v1/completions", json={"x": 1}, timeout=TIMEOUT).status_code == 400
            child.tell(SystemState(stage=Stage.DRAINING))
            # it had time to send its spans; the kernel would end it after more than that
            assert child.process.wait(TIMEOUT) == 0


def test_it_does_not_import_torch() -> None:
    """Torch takes seconds to import, and the port should tell the truth before that."""
    code = "import llmd.server.process, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
