"""`llmd status`: reading what a server says, the picture, and the exit status that a container's check asks for."""

import json
import math
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd.cli.flags import build_parser
from llmd.cli.samples import Samples, parse_samples, quantile, since
from llmd.cli.scrape import Scrape, first_key, target
from llmd.cli.status import NOT_READY, READY, UNREACHABLE, status
from llmd.cli.status_view import picture, render
from llmd.errors import StartupFailed

OURS = 'engine="0",model_name="tiny"'


def recorded(*, tokens: int, started: float = 1000.0, waiting: int = 0) -> Samples:
    """As a server says it, with so many output tokens, half as many prompt tokens, and a first token every ten."""
    return parse_samples(f"""\
# HELP vllm:num_requests_running Sequences that the engine computes.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{{OURS}}} 12.0
vllm:num_requests_waiting{{{OURS}}} {waiting}.0
llmd:queue_age_seconds{{{OURS}}} {0.8 if waiting else 0}
llmd:build_info{{version="0.1.0"}} 1.0
llmd:start_time_seconds {started}
llmd:servers_unreachable 0.0
vllm:cache_config_info{{block_size="16",{OURS},max_model_len="512",num_gpu_blocks="2048"}} 1.0
vllm:kv_cache_usage_perc{{{OURS}}} 0.48
vllm:prompt_tokens_total{{{OURS}}} {tokens / 2}
vllm:prompt_tokens_cached_total{{{OURS}}} {tokens / 8}
vllm:generation_tokens_total{{{OURS}}} {tokens}
vllm:time_to_first_token_seconds_bucket{{{OURS},le="0.1"}} 0.0
vllm:time_to_first_token_seconds_bucket{{{OURS},le="0.25"}} {tokens / 20}
vllm:time_to_first_token_seconds_bucket{{{OURS},le="0.5"}} {tokens / 10}
vllm:time_to_first_token_seconds_bucket{{{OURS},le="+Inf"}} {tokens / 10}
vllm:inter_token_latency_seconds_bucket{{{OURS},le="0.01"}} {tokens}
vllm:inter_token_latency_seconds_bucket{{{OURS},le="+Inf"}} {tokens}
vllm:request_success_total{{{OURS},finished_reason="stop"}} 1204.0
vllm:request_success_total{{{OURS},finished_reason="length"}} 88.0
vllm:admission_rejections_total{{{OURS},reason="queued_reqs"}} 3.0
vllm:admission_rejections_total{{{OURS},reason="queued_tokens"}} 4.0
vllm:num_preemptions_total{{{OURS}}} 2.0
llmd:resumed_requests_total{{{OURS}}} 5.0
process_resident_memory_bytes{{server="0"}} 1.0
process_resident_memory_bytes{{server="1"}} 1.0
""")


HEALTHY = {"status": "ok", "detail": "", "progress": None, "restarts": 1}


def scraped(time: float, samples: Samples | None, health: dict[str, Any] | None = HEALTHY, problem: str = "") -> Scrape:
    return Scrape(time=time, health=health, samples=samples, problem=problem)


def drawn(now: Scrape, before: Scrape | None = None, *, wall_time: float = 1000.0 + 7980) -> str:
    return "\n".join(render(picture("http://host:8000", now, before, wall_time=wall_time)))


# --- numbers


def test_samples_as_prometheus_writes_them() -> None:
    samples = parse_samples(
        '# HELP a b\na{x="1",y="q\\"\\\\\\n"} 2\na{x="2",y="z"} 3e0\nb 1 1700000000000\nc{x="}"} +Inf\nnonsense\nd x\n'
    )
    assert samples.values["a"] == [({"x": "1", "y": 'q"\\\n'}, 2.0), ({"x": "2", "y": "z"}, 3.0)]
    assert samples.total("a") == 5
    assert samples.total("a", x="2") == 3
    assert samples.by_label("a", "x") == {"1": 2, "2": 3}
    assert samples.total("b") == 1
    assert samples.label("c", "x") == "}"
    assert samples.total("c") == math.inf
    assert not {"nonsense", "d"} & samples.values.keys()


@pytest.mark.parametrize(
    ("histogram", "q", "expected"),
    [
        # evenly spread within the bucket, as Prometheus does it
        ({1.0: 0, 2.0: 10, math.inf: 10}, 0.5, 1.5),
        ({1.0: 10, 2.0: 20, math.inf: 20}, 0.95, 1.9),
        ({1.0: 10, math.inf: 10}, 0.5, 0.5),
        # what is beyond the last bound is as large as that
        ({1.0: 1, 2.0: 1, math.inf: 10}, 0.5, 2.0),
        ({1.0: 4, math.inf: 4}, 0.0, 0.0),
        ({1.0: 0, math.inf: 0}, 0.5, None),
        ({}, 0.5, None),
    ],
)
def test_quantiles(histogram: dict[float, float], q: float, expected: float | None) -> None:
    assert quantile(histogram, q) == pytest.approx(expected)


@given(st.lists(st.floats(0.001, 900), min_size=1), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_a_quantile_is_in_the_bucket_of_the_exact_one(values: list[float], q: float) -> None:
    bounds = [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, math.inf]
    histogram = {bound: float(sum(value <= bound for value in values)) for bound in bounds}
    exact = sorted(values)[max(math.ceil(q * len(values)) - 1, 0)]
    upper = next(bound for bound in bounds if exact <= bound)
    lower = max([0.0, *(bound for bound in bounds if bound < upper)])
    estimate = quantile(histogram, q)
    assert estimate is not None
    assert lower <= estimate <= upper


def test_between_two_readings() -> None:
    assert since({1.0: 5, math.inf: 9}, {1.0: 2, math.inf: 3}) == {1.0: 3, math.inf: 6}


# --- the picture


def test_a_busy_server() -> None:
    before, now = recorded(tokens=1000), recorded(tokens=4180, waiting=3)
    assert (
        drawn(scraped(10.0, now), scraped(0.0, before))
        == """\
● ready · tiny at http://host:8000 · llmd 0.1.0
  up 2 h 13 min · 1 engine restart · 2 server processes

  requests     12 running · 3 waiting · longest wait for a first token 800 ms
  KV cache     ██████████████░░░░░░░░░░░░░░░░  48% of 32,768 tokens

  last 10 s
  tokens/s     159 in · 318 out
  first token  250 ms p50 · 475 ms p95
  next token   5.0 ms p50 · 9.5 ms p95
  prefix hits  25% of prompt tokens

  since the start
  tokens       2,090 in · 4,180 out
  ended        1,204 stop · 88 length · 0 abort · 0 error
  besides      7 refused · 2 preempted · 5 resumed"""
    )


def test_one_look_has_no_rates_but_all_latencies() -> None:
    text = drawn(scraped(0.0, recorded(tokens=1000)))
    assert "tokens/s" not in text
    assert "first token  250 ms p50 · 475 ms p95" in text.partition("since the start")[2]


def test_a_server_that_began_anew_has_no_negative_rates() -> None:
    text = drawn(scraped(10.0, recorded(tokens=10, started=2000.0)), scraped(0.0, recorded(tokens=1000)))
    assert "tokens/s" not in text
    # and one of whose server processes was killed loses what that had counted last
    text = drawn(scraped(10.0, recorded(tokens=900)), scraped(0.0, recorded(tokens=1000)))
    assert "tokens/s     0.0 in · 0.0 out" in text


def test_what_stands_between_now_and_ready() -> None:
    loading = {"status": "loading", "detail": "loading weights", "progress": 0.4, "restarts": 0}
    locked = scraped(0.0, None, loading, problem="/metrics: HTTP 401")
    assert drawn(locked) == "● loading: loading weights 40% · http://host:8000\n  /metrics: HTTP 401"
    assert drawn(scraped(0.0, None, None, problem="refused")) == "● unreachable: refused · http://host:8000"


def test_nothing_yet_is_a_dash_and_not_a_zero() -> None:
    text = drawn(scraped(1.0, recorded(tokens=10)), scraped(0.0, recorded(tokens=10)))
    for name in ("first token", "next token", "prefix hits"):
        assert f"{name:<12} –" in text


# --- where it looks


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("host:80", (False, "host", 80, "")),
        ("http://host", (False, "host", None, "")),
        ("https://[::1]:8443/llm/", (True, "::1", 8443, "/llm")),
    ],
)
def test_addresses(url: str, expected: tuple[object, ...]) -> None:
    found = target(url)
    assert (found.tls is not None, found.host, found.port, found.prefix) == expected


@pytest.mark.parametrize("url", ["", "ftp://host", "http://host:port", "http://"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(StartupFailed):
        target(url)


def test_the_first_key_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n  sk-one \nsk-two\n")
    assert first_key(file) == "sk-one"
    file.write_text("# none\n")
    with pytest.raises(StartupFailed, match="no key"):
        first_key(file)
    with pytest.raises(StartupFailed, match="No such file"):
        first_key(tmp_path / "missing")


# --- the command


class Answers(BaseHTTPRequestHandler):
    """What the server says, by path: status and body. The figures need a key."""

    said: dict[str, tuple[int, bytes]]

    def do_GET(self) -> None:
        code, body = self.said.get(self.path, (404, b""))
        if self.path == "/metrics" and self.headers["authorization"] != "Bearer sk-one":
            code, body = 401, b""
        self.send_response(code)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def address_string(self) -> str:
        return "here"  # clients of a unix socket have none


class UnixServer(ThreadingHTTPServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)


@contextmanager
def answering(server: HTTPServer, health: object, metrics: bytes = b"") -> Iterator[None]:
    server.RequestHandlerClass.said = {  # type: ignore[attr-defined]
        "/health": (200, json.dumps(health).encode()),
        "/metrics": (200, metrics),
    }
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_status(*arguments: str) -> int:
    return status(build_parser().parse_args(["status", *arguments]))


def http_server() -> tuple[ThreadingHTTPServer, str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    return server, f"http://127.0.0.1:{server.server_address[1]}"


def test_the_exit_status_is_a_health_check(capsys: pytest.CaptureFixture[str]) -> None:
    server, url = http_server()
    with answering(server, HEALTHY):
        assert run_status(url, "--once") == READY
        # ready is ready, whether the figures may be read or not
        assert "--api-key-file" in capsys.readouterr().out
    server, url = http_server()
    with answering(server, {"status": "restarting", "detail": "the engine is being restarted"}):
        assert run_status(url, "--once") == NOT_READY
        assert "restarting: the engine" in capsys.readouterr().out
    assert run_status(url, "--once") == UNREACHABLE
    assert "connection refused" in capsys.readouterr().out
    server, url = http_server()
    with answering(server, "hello"):
        assert run_status(url, "--once") == UNREACHABLE


def test_json_is_one_object_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("sk-one\n")
    server = UnixServer(str(tmp_path / "socket"), Answers)  # type: ignore[arg-type]
    with answering(server, HEALTHY, f"vllm:num_requests_running{{{OURS}}} 7\n".encode()):
        arguments = ("--uds", str(tmp_path / "socket"), "--api-key-file", str(tmp_path / "keys"), "--once", "--json")
        assert run_status(*arguments) == READY
    shown = json.loads(capsys.readouterr().out)
    assert (shown["stage"], shown["figures"]["running"], shown["figures"]["model"]) == ("ready", 7, "tiny")


def test_on_a_terminal_it_draws_over_itself_until_ctrl_c() -> None:
    server, url = http_server()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "llmd", "status", url, "--interval", "0.1"]
    with (
        answering(server, HEALTHY),
        # what a shell starts in the background, these tests too, has Ctrl-C ignored
        subprocess.Popen(
            command,
            stdout=theirs,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):
        os.close(theirs)
        drawn = b""
        while drawn.count(b"\x1b[J") < 3:
            drawn += os.read(ours, 1 << 16)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait() == 0
    drawn += os.read(ours, 1 << 16)
    os.close(ours)
    # headline and problem; up by as many lines as were drawn, and the cursor is there again at the end
    assert drawn.count(b"ready") >= 3
    assert b"\x1b[2A\r\x1b[J" in drawn
    assert drawn.endswith(b"\x1b[?25h")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    server, url = http_server()
    command = [sys.executable, "-m", "llmd", "status", url, "--interval", "0.1"]
    with (
        answering(server, HEALTHY),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("● ready".encode())
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, llmd.cli.flags, llmd.cli.status; "
        "sys.exit(bool({'torch', 'trio', 'quart', 'prometheus_client', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "arguments", [("--interval", "0"), ("--insecure", "--cacert", "x"), ("--api-key", "a", "--api-key-file", "b")]
)
def test_nonsense_is_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["status", *arguments])
