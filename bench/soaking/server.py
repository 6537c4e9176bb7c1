"""The command under test as a process tree: starting it, finding its processes, and what they hold. Linux only (/proc).

Knows no request.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT = 600.0  # seconds; a guard against hanging for ever: the first start may have to fetch the model
STOP_TIMEOUT = 180.0

_SOCKET = re.compile(r"socket:\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one process holds of the machine."""

    num_fds: int
    num_threads: int
    rss: int  # bytes


class ServerUnderTest:
    """A live `llmd serve`, in a session of its own. `folder` takes its log and its temporary files."""

    def __init__(self, arguments: list[str], *, folder: Path) -> None:
        self.log_path = folder / "server.log"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llmd", "serve", "--port", "0", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(self.temporary)},
                start_new_session=True,
            )
        self.url = ""

    async def wait_url(self) -> None:
        """Until it has said where it listens. Raises RuntimeError if it ends instead."""
        async with asyncio.timeout(START_TIMEOUT):
            while not (found := re.search(r"https?://[^\s\"',]+:\d+", self.log())):
                if self.process.poll() is not None:
                    raise RuntimeError(f"llmd serve ended with status {self.process.returncode}:\n{self.log()}")
                await asyncio.sleep(0.05)
        self.url = found[0]

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.partition("://")[2].rpartition(":")
        return host.strip("[]"), int(port)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def pids(self, module: str) -> list[int]:
        """The supervisor's children that run this module, oldest first."""
        return child_pids(self.process.pid, module)

    def holdings(self) -> dict[str, list[Holdings]]:
        """Of the processes that are never replaced for the engine's sake: "supervisor" and "server"."""
        found = {"supervisor": [self.process.pid], "server": self.pids("llmd.server")}
        return {role: [held for pid in pids if (held := _holdings(pid))] for role, pids in found.items()}

    async def stop(self) -> int | None:
        """SIGTERM, and the exit status; None if it does not end."""
        self.process.send_signal(signal.SIGTERM)
        return await self.wait_end()

    async def wait_end(self) -> int | None:
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT):
                while self.process.poll() is None:
                    await asyncio.sleep(0.05)
        return self.process.poll()

    def processes_left(self) -> list[int]:
        """Everything of its session that runs."""
        return [pid for pid in _all_pids() if _session(pid) == self.process.pid]

    def kill_session(self) -> None:
        """The end of all that is still there."""
        for pid in self.processes_left():
            send_signal(pid, signal.SIGKILL)
        self.process.wait()


def send_signal(pid: int, number: signal.Signals) -> bool:
    """False if there is no such process any more."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def child_pids(pid: int, module: str) -> list[int]:
    """The children of this process that run `python -m module`, oldest first."""
    children = " ".join(_lines(Path(f"/proc/{pid}/task/{pid}/children"))).split()
    return [int(child) for child in children if _module(int(child)) == module]


def client_ports(pid: int) -> set[int]:
    """The ports at the other end of this process's TCP connections."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if found := _SOCKET.fullmatch(os.readlink(fd)):
                inodes.add(found[1])
    rows = [row.split() for table in ("tcp", "tcp6") for row in _lines(Path(f"/proc/{pid}/net/{table}"))[1:]]
    return {int(row[2].rpartition(":")[2], 16) for row in rows if row[9] in inodes}


def _lines(path: Path) -> list[str]:
    with suppress(OSError):
        return path.read_text().splitlines()
    return []


def _module(pid: int) -> str | None:
    """What `python -m` runs there; None for a child that was forked this moment, or is gone."""
    with suppress(OSError):
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if "-m" in arguments[:-1]:
            return arguments[arguments.index("-m") + 1]
    return None


def _holdings(pid: int) -> Holdings | None:
    with suppress(OSError):
        status = Counter(dict(_status_numbers(pid)))
        num_fds = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return Holdings(num_fds=num_fds, num_threads=status["Threads"], rss=status["VmRSS"] << 10)
    return None


def _status_numbers(pid: int) -> Iterator[tuple[str, int]]:
    for line in _lines(Path(f"/proc/{pid}/status")):
        name, _, value = line.partition(":")
        if name in ("Threads", "VmRSS"):
            yield name, int(value.split()[0])


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _session(pid: int) -> int | None:
    """Its session's id; None if it is gone, or dead and not yet reaped."""
    with suppress(OSError):
        # the name in front, in parentheses, may hold anything
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[3])
    return None
