"""The log of the whole command: every line of every process in one form, and no secret in any."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer, running_server

pytestmark = pytest.mark.slow

MARKER = "sq7MARKER7qs"
HEADERS = {"Authorization": f"Bearer sk-{MARKER}", "Cookie": f"a={MARKER}", "X-Request-Id": "trace-1"}
TEXT_LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (supervisor|server|engine|worker)\[\d+\] (\w+)( \S+)?: .*"
)


def eventful_life(server: RunningServer) -> None:
    """Answers, refusals, a stream whose engine is killed and replaced, a client that leaves, a stop."""
    with httpx.Client(base_url=server.base_url, headers=HEADERS, timeout=START_TIMEOUT) as client:
        body = {"prompt": MARKER, "max_tokens": 3, "echo": True}
        assert MARKER in client.post("/completions", json=body).json()["choices"][0]["text"]
        assert client.post("/completions", json={"prompt": MARKER, MARKER: 1}).status_code == 400
        assert client.post("/completions", json={"prompt": MARKER * 1000}).status_code == 400
        assert client.post("/completions", content=MARKER, headers={"content-type": "text/x"}).status_code == 415
        assert client.get("/nowhere", params={"q": MARKER}).status_code == 404
        pids = server.child_pids()
        long = {"prompt": MARKER, "max_tokens": 60, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/completions", json=long) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(pids["llmd.worker"], signal.SIGKILL)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        with client.stream("POST", "/completions", json=long) as answer:
            next(answer.iter_lines())
    assert server.stop() == 0


def test_one_form_and_no_secrets(tiny_model_dir: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"sk-{MARKER}\n")
    flags = ["--log-format", "json", "--log-level", "debug", "--enable-access-log", "--api-key-file", str(keys)]
    with running_server("--model", str(tiny_model_dir), *flags) as server:
        eventful_life(server)
    assert MARKER not in "\n".join(server.log)
    lines = [json.loads(line) for line in server.log]
    assert {"supervisor", "server"} <= {line["process"] for line in lines}
    answered = [line for line in lines if line["message"] == "answered"]
    assert [line["status"] for line in answered] == [200, 400, 400, 415, 404, 200]
    assert {line["request_id"] for line in answered} == {"trace-1"}
    assert answered[-1]["completion_tokens"] == 60
    assert all(line["path"].startswith("/v1/") for line in answered)
    assert [line["status"] for line in lines if line["message"] == "499 client left"] == [499]


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_cannot_start_says_so_in_the_same_form(form: str, tmp_path: Path) -> None:
    command = ["llmd", "serve", "--model", str(tmp_path / "none"), "--port", "0", "--log-format", form]
    ended = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=START_TIMEOUT)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "There is no model at" in line
    assert json.loads(line)["level"] == "error" if form == "json" else TEXT_LINE.fullmatch(line)


def test_prompts_in_the_log_are_announced(tiny_model_dir: Path) -> None:
    with running_server("--model", str(tiny_model_dir), "--enable-log-requests", "--max-log-len", "4") as server:
        httpx.post(f"{server.base_url}/completions", json={"prompt": MARKER, "max_tokens": 1}, timeout=START_TIMEOUT)
        server.stop()
    assert [line for line in server.log if not TEXT_LINE.fullmatch(line)] == []
    assert any("warning: prompts are logged" in line for line in server.log)
    assert any(f"prompt={MARKER[:4]}…" in line for line in server.log)
