"""`python -m llmd.worker` as the supervisor starts it: a real process; the test plays supervisor and engine."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmd.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from llmd.protocol.control import Beat, ChildFailed, ChildReady, ChildToSupervisor, Line
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.steps import RankReady, WorkerToEngine

pytestmark = pytest.mark.slow

TIMEOUT = 120.0  # seconds; a guard against hanging for ever


@dataclass
class Worker:
    process: subprocess.Popen[bytes]
    control: socket.socket
    engine: socket.socket

    def messages(self) -> list[ChildToSupervisor]:
        """All that it tells the supervisor until it is ready, or ends."""
        decoder: FrameDecoder[ChildToSupervisor] = FrameDecoder(ChildToSupervisor)
        messages: list[ChildToSupervisor] = []
        while not any(isinstance(message, ChildReady) for message in messages) and (data := self.control.recv(1000)):
            messages += decoder.feed(data)
        return messages

    def ready(self) -> WorkerToEngine:
        decoder: FrameDecoder[WorkerToEngine] = FrameDecoder(WorkerToEngine)
        (message,) = decoder.feed(self.engine.recv(1000))
        return message


@contextmanager
def worker_process(model_dir: Path, *, num_blocks: int | None) -> Iterator[Worker]:
    control, its_control = socket.socketpair()
    engine, its_engine = socket.socketpair()
    config = WorkerConfig(
        model=ModelConfig(cache_dir="", served_names=("tiny",), device="cpu", threads=1),
        model_dir=str(model_dir),
        cache=CacheConfig(),
        scheduler=SchedulerConfig(),
        rank=0,
        engine_fd=its_engine.fileno(),
        num_blocks=num_blocks,
    )
    control.sendall(encode_frame(config))
    with its_control, its_engine:
        fds = (its_control.fileno(), its_engine.fileno())
        process = subprocess.Popen([sys.executable, "-m", "llmd.worker", str(fds[0])], pass_fds=fds)
    with control, engine:
        control.settimeout(TIMEOUT)
        engine.settimeout(TIMEOUT)
        try:
            yield Worker(process, control, engine)
        finally:
            process.kill()
            process.wait()


def test_it_allocates_what_the_engine_had_before_and_ends_with_it(tiny_model_dir: Path) -> None:
    with worker_process(tiny_model_dir, num_blocks=7) as worker:
        messages = worker.messages()
        # the first sign of life comes long before the model is there
        assert messages[0] == Beat()
        assert isinstance(messages[-1], ChildReady)
        assert worker.ready() == RankReady(rank=0, num_blocks=7, max_model_len=7 * 16, vocab_size=264)
        worker.engine.close()
        assert worker.process.wait(TIMEOUT) == 0


def test_it_fails_only_where_the_memory_is_not_there_at_all(tiny_model_dir: Path) -> None:
    # 2^44 blocks are more than any address space holds
    with worker_process(tiny_model_dir, num_blocks=1 << 44) as worker:
        messages = worker.messages()
        assert any(isinstance(message, Line) and "as large as before" in message.text for message in messages)
        assert isinstance(messages[-1], ChildFailed)
        assert "memory" in messages[-1].message
        assert worker.process.wait(TIMEOUT) == 1
