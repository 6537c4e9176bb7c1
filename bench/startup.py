"""From the command to an open port, a truthful /health, and the first token, in seconds.

    python bench/startup.py [--runs 5] [-- FLAGS OF llmd serve]

Beside each figure stands what a bare `python -c "import torch"` takes in the same run: the model's process cannot start
faster than that, so the ratio to it says more about llmd than the seconds do.
"""

import argparse
import http.client
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, fields

GOALS = {"port open": 0.3, "health answers": 1.2, "first token": 4.0}
_POLL = 0.005  # seconds between two looks
_LIMIT = 300.0  # seconds


@dataclass(frozen=True, slots=True)
class Startup:
    """Seconds since the command was given."""

    port_open: float
    health_answers: float
    ready: float
    first_token: float


def measure(flags: list[str]) -> Startup:
    """Start the server once and take the times."""
    port = _free_port()
    started = time.perf_counter()
    command = [sys.executable, "-m", "llmd", "serve", "--port", str(port), *flags]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def since_start() -> float:
        elapsed = time.perf_counter() - started
        if elapsed > _LIMIT or process.poll() is not None:
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        return elapsed

    try:
        while not _connects(port):
            since_start()
            time.sleep(_POLL)
        port_open = since_start()
        # the first request waits in the backlog until somebody answers it
        status = _get_status(port, "/health")
        health_answers = since_start()
        while status != 200:
            since_start()
            time.sleep(_POLL)
            status = _get_status(port, "/health")
        ready = since_start()
        _first_token(port)
        return Startup(port_open, health_answers, ready, since_start())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _get_status(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    status = connection.getresponse().status
    connection.close()
    return status


def _first_token(port: int) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": 4, "temperature": 0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            chunk = json.loads(line.removeprefix(b"data: "))
            if chunk["choices"][0]["delta"].get("content"):
                connection.close()
                return
    raise SystemExit("the stream held no token")


def _import_torch() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("flags", nargs="*", help="flags of `llmd serve`, after --")
    arguments = parser.parse_args()
    measure(arguments.flags)  # caches warm, model fetched
    runs, torch_imports = [], []
    for _ in range(arguments.runs):
        runs.append(measure(arguments.flags))
        torch_imports.append(_import_torch())
    torch_import = statistics.median(torch_imports)
    print(f"{'':16}{'min':>8}{'median':>8}{'max':>8}{'/ torch':>9}{'goal':>7}")
    for field in fields(Startup):
        name = field.name.replace("_", " ")
        values = [getattr(run, field.name) for run in runs]
        median = statistics.median(values)
        goal = f"{GOALS[name]:7.1f}" if name in GOALS else ""
        print(f"{name:16}{min(values):8.2f}{median:8.2f}{max(values):8.2f}{median / torch_import:9.2f}{goal}")
    print(f"{'import torch':16}{min(torch_imports):8.2f}{torch_import:8.2f}{max(torch_imports):8.2f}")


if __name__ == "__main__":
    main()
