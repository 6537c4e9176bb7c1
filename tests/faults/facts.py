"""What can be seen of a running server from outside: its metrics, and what its processes hold."""

import os
import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer

Seen = TypeVar("Seen")

# linux/include/net/tcp_states.h
_LISTENING = "0A"
# for what must happen soon; generous, because the machine may be busy
_SOON = 40.0  # seconds

_SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Figures:
    """Of /metrics, by our own short names."""

    num_running: float = 0
    num_waiting: float = 0
    cache_usage: float = 0
    num_computed_tokens: float = 0  # by this engine and those before it
    num_output_tokens: float = 0  # the same
    num_preemptions: float = 0
    num_aborted: float = 0  # sequences that nobody wanted any more
    num_ended: float = 0  # sequences, however they ended

    @property
    def is_idle(self) -> bool:
        return self.num_running == self.num_waiting == self.cache_usage == 0


_NAMES = {
    "vllm:num_requests_running": "num_running",
    "vllm:num_requests_waiting": "num_waiting",
    "vllm:kv_cache_usage_perc": "cache_usage",
    "vllm:iteration_tokens_total_sum": "num_computed_tokens",
    "vllm:generation_tokens_total": "num_output_tokens",
    "vllm:num_preemptions_total": "num_preemptions",
    "vllm:request_success_total": "num_ended",
}
assert set(_NAMES.values()) <= {each.name for each in fields(Figures)}


def figures(server: RunningServer) -> Figures:
    # httpx would take longer to make a client than the server to answer
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=START_TIMEOUT) as response:
        text = response.read().decode()
    found: dict[str, float] = {}
    for sample in _SAMPLE.finditer(text):
        if name := _NAMES.get(sample["name"]):
            found[name] = found.get(name, 0) + float(sample["value"])
            if 'finished_reason="abort"' in (sample["labels"] or ""):
                found["num_aborted"] = float(sample["value"])
    return Figures(**found)


def wait_for(look: Callable[[], Seen], holds: Callable[[Seen], bool]) -> Seen:
    """Ask until the answer is right; the time is a guard against hanging only."""
    give_up = time.monotonic() + _SOON
    while not holds(seen := look()):
        assert time.monotonic() < give_up, f"it is still {seen}"
    return seen


@dataclass(frozen=True)
class Holdings:
    """What the server's processes hold of the machine."""

    num_fds: dict[str, int]  # by module
    num_threads: dict[str, int]  # the same; threads that only wait for work are not counted


def holdings(server: RunningServer) -> Holdings:
    """Once the connections that have been left are gone, those of these questions too."""
    wait_for(lambda: num_connections(server), lambda number: number == 0)
    # the server has a file open for a moment, once a second
    first, _ = wait_for(lambda: (_holdings(server), _holdings(server)), lambda looks: looks[0] == looks[1])
    return first


def _holdings(server: RunningServer) -> Holdings:
    pids = {"supervisor": server.process.pid, **server.child_pids()}
    return Holdings(
        num_fds={module: len(os.listdir(f"/proc/{pid}/fd")) for module, pid in pids.items()},
        num_threads={module: len(busy_threads(pid)) for module, pid in pids.items()},
    )


def num_connections(server: RunningServer) -> int:
    """TCP connections to the server's port that a process of it has accepted and not closed yet."""
    port = f":{urlsplit(server.url).port:04X}"
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    # local address, state and inode; what is not accepted yet, or closed already, has none
    return sum(fields[1].endswith(port) and fields[3] != _LISTENING and fields[9] != "0" for fields in sockets)


def busy_threads(pid: int) -> list[str]:
    """Their names: of the function that they run, up to 15 characters; "Trio thread 0" is one that has no work."""
    names = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            names.append(Path(f"/proc/{pid}/task/{thread}/comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [name for name in names if not name.startswith("Trio thread")]


def resident_bytes(server: RunningServer) -> int:
    """Memory of the supervisor and all its children."""
    pids = [server.process.pid, *server.child_pids().values()]
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def descendants(pid: int) -> list[int]:
    """Pids of its children, their children and so on, as of now."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found
