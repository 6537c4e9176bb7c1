"""Runs `python -m llmd.fetch` as the supervisor does, and listens to what it says."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmd.config import FetchConfig, ModelConfig
from llmd.protocol.control import ChildFailed, ChildProgress, ChildReady, ChildToSupervisor
from llmd.protocol.framing import FrameDecoder, encode_frame


@dataclass(frozen=True)
class Outcome:
    """What a fetcher said until it ended."""

    exit_code: int
    messages: list[ChildToSupervisor]
    errors: str  # what it wrote to stderr

    @property
    def ready(self) -> Path:
        """The folder, if it made one."""
        last = self.messages[-1]
        assert isinstance(last, ChildReady), (last, self.errors)
        assert last.model_dir is not None
        assert self.exit_code == 0
        return Path(last.model_dir)

    @property
    def failure(self) -> str:
        """Its message, if it failed as it should: a message and no trace."""
        last = self.messages[-1]
        assert isinstance(last, ChildFailed), (last, self.errors)
        assert self.exit_code == 1
        assert "Traceback" not in self.errors
        return last.message

    @property
    def progress(self) -> list[ChildProgress]:
        return [message for message in self.messages if isinstance(message, ChildProgress)]


class RunningFetcher:
    """A fetcher that has its configuration."""

    def __init__(self, process: "subprocess.Popen[str]", control: socket.socket) -> None:
        self.process = process
        self._control = control
        self._decoder: FrameDecoder[ChildToSupervisor] = FrameDecoder(ChildToSupervisor)
        self._messages: list[ChildToSupervisor] = []

    def wait_progress(self, detail: str) -> None:
        """Until it says that it does this."""
        while not any(isinstance(m, ChildProgress) and m.detail == detail for m in self._messages):
            assert self._receive(), "it ended before"

    def wait(self) -> Outcome:
        """Until it ends."""
        while self._receive():
            pass
        assert self.process.stderr is not None
        errors = self.process.stderr.read()
        return Outcome(self.process.wait(), self._messages, errors)

    def _receive(self) -> bool:
        data = self._control.recv(1 << 16)
        self._messages.extend(self._decoder.feed(data))
        return bool(data)


@contextmanager
def running_fetcher(
    source: str | None, *, cache_dir: Path, revision: str | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[RunningFetcher]:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "llmd.fetch", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **(environment or {})},
                stderr=subprocess.PIPE,
                text=True,
            )
        with process:
            model = ModelConfig(source=source, revision=revision, cache_dir=str(cache_dir), served_names=("m",))
            ours.sendall(encode_frame(FetchConfig(model=model)))
            try:
                yield RunningFetcher(process, ours)
            finally:
                process.kill()


def run_fetcher(
    source: str | None, *, cache_dir: Path, revision: str | None = None, environment: Mapping[str, str] | None = None
) -> Outcome:
    with running_fetcher(source, cache_dir=cache_dir, revision=revision, environment=environment) as fetcher:
        return fetcher.wait()
