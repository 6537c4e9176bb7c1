"""`llmd serve` as a child: its start step by step, and the CPU time of its processes. Linux only (/proc)."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from bench.soaking.server import child_pids

_POLL = 0.005  # seconds between two looks
# Seconds, and the share of one core that a worker uses less than when it has nothing to do.
_LOOK = 0.3
_IDLE_SHARE = 0.1
_START_TIMEOUT = 170.0  # seconds
_STOP_TIMEOUT = 20.0
_CHILDREN = {"server": "llmd.server", "engine": "llmd.engine", "worker": "llmd.worker"}
_TICKS = os.sysconf("SC_CLK_TCK")  # a second


class ServerProcess:
    """Started when entered, ended when left. `folder`: where its log goes."""

    def __init__(self, flags: Sequence[str], *, folder: Path) -> None:
        self._flags = flags
        self._folder = folder

    def __enter__(self) -> Self:
        self.port = _free_port()
        self.model = ""  # known once it is ready
        self._log_path = Path(tempfile.mkstemp(dir=self._folder, suffix=".log")[1])
        self._started = time.perf_counter()
        command = [sys.executable, "-m", "llmd", "serve", "--port", str(self.port), *self._flags]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def since_start(self) -> float:
        """Seconds. Raises RuntimeError, with the end of its log, if it has ended or has been starting for too long."""
        elapsed = time.perf_counter() - self._started
        if self._process.poll() is not None or elapsed > _START_TIMEOUT:
            raise RuntimeError(f"llmd serve is not ready after {elapsed:.1f} s: {self._log_path.read_text()[-3000:]}")
        return elapsed

    def wait_ready(self) -> dict[str, float]:
        """Seconds from the command to: the open port, /health's first answer, each stage that it tells, ready."""
        while not _connects(self.port):
            self.since_start()
            time.sleep(_POLL)
        timeline = {"port open s": self.since_start()}
        status = ""
        while status != "ok":
            status = self._json("/health")["status"]
            if status == "failed":
                raise RuntimeError(f"llmd serve failed: {self._log_path.read_text()[-3000:]}")
            timeline.setdefault("health answers s", self.since_start())
            timeline.setdefault("ready s" if status == "ok" else f"{status} s", self.since_start())
            time.sleep(0 if status == "ok" else _POLL)
        self.model = self._json("/v1/models")["data"][0]["id"]
        return timeline

    def wait_idle(self, limit: float) -> float:
        """Until its workers use next to no CPU time, or `limit` seconds: one without work captures graphs → seconds."""
        started = time.perf_counter()
        before = self.cpu_seconds().get("worker", 0.0)
        while time.perf_counter() - started < limit:
            time.sleep(_LOOK)
            now = self.cpu_seconds().get("worker", 0.0)
            if now - before < _IDLE_SHARE * _LOOK:
                break
            before = now
        return time.perf_counter() - started

    def num_steps(self) -> float:
        """Steps of the engine since the start."""
        text = self._get("/metrics").decode()
        counts = [line for line in text.splitlines() if line.startswith("vllm:iteration_tokens_total_count")]
        return sum(float(line.rpartition(" ")[2]) for line in counts)

    def cpu_seconds(self) -> dict[str, float]:
        """Of the processes of each kind, since their start; without kinds that cannot be found in this /proc."""
        pids = {kind: child_pids(self._process.pid, module) for kind, module in _CHILDREN.items()}
        return {kind: sum(map(_cpu_seconds, found)) for kind, found in pids.items() if found}

    @contextlib.contextmanager
    def counting(self) -> Iterator[dict[str, float]]:
        """Filled at the end: steps, and the CPU time a step of each kind of process."""
        counted: dict[str, float] = {}
        steps, before = self.num_steps(), self.cpu_seconds()
        yield counted
        after = self.cpu_seconds()
        counted["steps"] = self.num_steps() - steps
        for kind in after.keys() & before.keys():
            counted[f"{kind} CPU us a step"] = 1e6 * (after[kind] - before[kind]) / max(1.0, counted["steps"])

    def _json(self, path: str) -> Any:
        return json.loads(self._get(path))

    def _get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()


def _cpu_seconds(pid: int) -> float:
    try:
        # The name in front, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
