"""From kill -9 in the middle of a stream to the next token, in seconds. Nothing is subtracted.

    python bench/restart.py [--runs 3] [-- FLAGS OF llmd serve]

Beside the figures stands what a bare process takes to import torch and load the model in the same run: no restart that
begins with the death can be faster, so the difference to it is what llmd adds. The goal for that is 1.5 s.
"""

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

GOAL = 1.5  # seconds beyond the bare load
VICTIMS = ("worker", "engine")
_MIN_TOKENS = 20  # of the stream before the kill
_POLL = 0.005  # seconds between two looks
_LIMIT = 300.0  # seconds

_BARE_LOAD = """
import sys
from pathlib import Path
import torch
from llmd.model.checkpoint import load_decoder
load_decoder(Path(sys.argv[1]), dtype=torch.float32, device=torch.device("cpu"))
"""


@dataclass(frozen=True, slots=True)
class Restart:
    """Seconds since the kill."""

    ready: float  # /health says 200 again
    next_token: float


@dataclass(frozen=True, slots=True)
class Server:
    pid: int
    port: int

    def get_health(self) -> dict[str, object]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_LIMIT)
        connection.request("GET", "/health")
        health: dict[str, object] = json.loads(connection.getresponse().read())
        connection.close()
        return health

    def wait_ready(self, *, restarts: int) -> None:
        """Until it is ready after so many restarts."""
        deadline = time.perf_counter() + _LIMIT
        while (health := self.get_health())["status"] != "ok" or health["restarts"] != restarts:
            if time.perf_counter() > deadline:
                raise SystemExit(f"the server did not get ready again: {health}")
            time.sleep(_POLL)

    def kill(self, name: str) -> None:
        for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            if f"llmd.{name}" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                os.kill(int(pid), signal.SIGKILL)

    def token_times(self) -> Iterator[float]:
        """Stream a long answer: when each piece of it came."""
        body = {"prompt": "Once upon a time", "stream": True, "max_tokens": 400, "temperature": 0, "ignore_eos": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_LIMIT)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                yield time.perf_counter()
        connection.close()


@contextmanager
def running_server(flags: list[str]) -> Iterator[Server]:
    """A server on a free port, ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llmd", "serve", "--port", "0", *flags], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        port = 0
        for line in process.stderr:
            if " · http://" in line:
                port = int(line.rpartition(":")[2])
            if "ready after" in line:
                break
        else:
            raise SystemExit("the server did not start")
        # nobody reads the rest, and it must not fill the pipe
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Server(process.pid, port)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def measure(server: Server, victim: str, *, restarts: int) -> Restart:
    """Kill it once in the middle of a stream. `restarts` is how many this makes."""
    times: list[float] = []
    killed = ready = 0.0
    waiting = None

    def wait_ready() -> None:
        nonlocal ready
        server.wait_ready(restarts=restarts)
        ready = time.perf_counter()

    for moment in server.token_times():
        times.append(moment)
        if len(times) == _MIN_TOKENS:
            killed = time.perf_counter()
            server.kill(victim)
            waiting = threading.Thread(target=wait_ready)
            waiting.start()
    if waiting is None:
        raise SystemExit("the stream ended too early")
    waiting.join()
    # what was on its way came right after the kill; the pause is the longest time without a token
    after = [killed, *(moment for moment in times if moment > killed)]
    _, next_token = max(pairwise(after), key=lambda pair: pair[1] - pair[0])
    return Restart(ready=ready - killed, next_token=next_token - killed)


def bare_load(flags: list[str]) -> float:
    """Seconds for a bare process to import torch and load the same model."""
    from llmd.cli.flags import build_parser
    from llmd.cli.resolve import resolve
    from llmd.fetch.source import find_ready

    model = resolve(build_parser().parse_args(["serve", *flags])).model
    folder = find_ready(model.source, revision=model.revision, cache_dir=Path(model.cache_dir))
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", _BARE_LOAD, str(folder)], check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="flags of `llmd serve`, after --")
    arguments = parser.parse_args()
    restarts: dict[str, list[Restart]] = {victim: [] for victim in VICTIMS}
    loads = []
    for _ in range(arguments.runs):
        # each run has a server of its own, so that no back-off of the run before is measured
        for victim in VICTIMS:
            with running_server(arguments.flags) as server:
                restarts[victim].append(measure(server, victim, restarts=1))
        loads.append(bare_load(arguments.flags))
    load = statistics.median(loads)
    print(f"{'':28}{'min':>8}{'median':>8}{'max':>8}{'- load':>8}{'goal':>7}")
    for victim, runs in restarts.items():
        print(_row(f"{victim}: kill to ready", [run.ready for run in runs], load))
        print(_row(f"{victim}: kill to next token", [run.next_token for run in runs], load) + f"{GOAL:7.1f}")
    print(_row("bare import and load", loads, load))


def _row(name: str, values: list[float], load: float) -> str:
    median = statistics.median(values)
    return f"{name:28}{min(values):8.2f}{median:8.2f}{max(values):8.2f}{median - load:8.2f}"


if __name__ == "__main__":
    main()
