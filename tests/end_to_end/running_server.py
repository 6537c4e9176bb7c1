"""Starts the real command in its own process, and waits for what it says."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

START_TIMEOUT = 120.0  # seconds; a guard against hanging for ever, not a claim about speed


@dataclass
class RunningServer:
    """A live `llmd serve`."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)
    logged: threading.Condition = field(default_factory=threading.Condition)

    @property
    def base_url(self) -> str:
        """What an OpenAI client is given."""
        return f"{self.url}/v1"

    def child_pids(self) -> dict[str, int]:
        """Module name → pid of the supervisor's children, e.g. {"llmd.worker": 1234}."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        modules = {}
        for pid in children:
            try:
                arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended just now
            # a child that was forked this moment still has our own command line
            if "-m" in arguments and (module := arguments[arguments.index("-m") + 1]) != "llmd":
                modules[module] = int(pid)
        return modules

    def wait_log(self, text: str, *, occurrences: int) -> None:
        """Block until so many lines of the log have had this text in them."""
        with self.logged:
            assert self.logged.wait_for(lambda: sum(text in line for line in self.log) >= occurrences, START_TIMEOUT), (
                self.log
            )

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(START_TIMEOUT)


@contextmanager
def running_server(
    *arguments: str, until: str = r"ready after", environment: Mapping[str, str] | None = None, threads: int = 1
) -> Iterator[RunningServer]:
    """`llmd serve --port 0 …` for as long as the block lasts; entered once a line of its log matches `until`.

    `threads`: of computation. More than one only slow a tiny model down, by far where others use the cores too: they
    wait for one another about a hundred times a step.
    """
    address = () if "--uds" in arguments else ("--port", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "llmd", "serve", *address, "--threads", str(threads), *arguments],
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        # its own process group, as under a shell: nothing of ours is left behind, whatever a test does
        start_new_session=True,
    )
    server = RunningServer(process)
    reached = threading.Event()

    def read_log() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with server.logged:
                server.log.append(line.rstrip("\n"))
                server.logged.notify_all()
            if found := re.search(r"https?://[^\s\"]+", line):
                server.url = server.url or found[0]
            if re.search(until, line):
                reached.set()
        reached.set()

    reader = threading.Thread(target=read_log, daemon=True)
    reader.start()
    try:
        assert reached.wait(START_TIMEOUT), server.log
        assert process.poll() is None, server.log
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join()


def get_json(url: str) -> tuple[int, object]:
    """Status and decoded body."""
    response = httpx.get(url, timeout=30)
    return response.status_code, response.json()
