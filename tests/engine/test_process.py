"""The engine as a real process with real sockets; the test plays supervisor, rank and server."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from llmd.config import CacheConfig, EngineConfig, SchedulerConfig
from llmd.protocol.control import ChildReady, ChildToSupervisor
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.generation import EngineReady, EngineToServer, FinishReason, GenerateRequest, SamplingParams
from tests.fakes import VOCAB_SIZE, FakeRank, expected_completion, serve_fake_rank

BLOCK_SIZE = 4


@dataclass
class EngineProcess:
    process: subprocess.Popen[bytes]
    control: socket.socket
    worker_path: str
    server_path: str


@contextmanager
def engine_process(folder: Path) -> Iterator[EngineProcess]:
    """The process, told its configuration; killed at the end if it still runs."""
    ours, theirs = socket.socketpair()
    listeners = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    paths = [str(folder / "worker"), str(folder / "server")]
    for listener, path in zip(listeners, paths, strict=True):
        listener.bind(path)
        listener.listen()
    fds = [theirs.fileno(), *(listener.fileno() for listener in listeners)]
    process = subprocess.Popen([sys.executable, "-m", "llmd.engine", str(fds[0])], pass_fds=fds, stderr=subprocess.PIPE)
    for inherited in (theirs, *listeners):
        inherited.close()
    config = EngineConfig(
        cache=CacheConfig(block_size=BLOCK_SIZE),
        scheduler=SchedulerConfig(),
        worker_listen_fd=fds[1],
        server_listen_fd=fds[2],
        num_ranks=1,
    )
    ours.sendall(encode_frame(config))
    with process, ours:
        try:
            yield EngineProcess(process, ours, *paths)
        finally:
            process.kill()


async def serve_rank(engine: EngineProcess, scope: trio.CancelScope) -> None:
    with scope:
        stream = await trio.open_unix_socket(engine.worker_path)
        try:
            await serve_fake_rank(stream, FakeRank(BLOCK_SIZE), num_blocks=50, max_model_len=100)
        except trio.BrokenResourceError:
            return


async def talk(engine: EngineProcess, *, lose_rank: bool) -> None:
    """Connect before the engine is ready, have one request answered, and then end either the rank or the engine."""
    request = GenerateRequest(request_id=3, prompt_token_ids=[5, 6, 7], sampling=SamplingParams(max_tokens=9, seed=0))
    received: list[EngineToServer] = []
    rank_scope = trio.CancelScope()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            server = await trio.open_unix_socket(engine.server_path)
            await server.send_all(encode_frame(request))
            nursery.start_soon(serve_rank, engine, rank_scope)
            decoder: FrameDecoder[EngineToServer] = FrameDecoder(EngineToServer)
            finish: FinishReason | None = None
            token_ids: list[int] = []
            while finish is None:
                for message in decoder.feed(await server.receive_some()):
                    received.append(message)
                    for event in [] if isinstance(message, EngineReady) else message.events:
                        token_ids += event.token_ids
                        finish = event.finish
            assert received[0] == EngineReady(
                max_model_len=100, block_size=BLOCK_SIZE, num_blocks=50, vocab_size=VOCAB_SIZE
            )
            assert (token_ids, finish) == expected_completion(request)
            control: FrameDecoder[ChildToSupervisor] = FrameDecoder(ChildToSupervisor)
            assert list(control.feed(engine.control.recv(1000))) == [ChildReady()]
            if lose_rank:
                rank_scope.cancel()
            else:
                engine.control.close()
            while await server.receive_some():
                pass


def test_it_serves_until_the_supervisor_closes_the_control_socket(tmp_path: Path) -> None:
    with engine_process(tmp_path) as engine:
        trio.run(lambda: talk(engine, lose_rank=False))
        assert engine.process.wait(30) == 0
        assert engine.process.stderr is not None
        assert engine.process.stderr.read() == b""


def test_it_ends_with_a_message_when_a_rank_is_lost(tmp_path: Path) -> None:
    with engine_process(tmp_path) as engine:
        trio.run(lambda: talk(engine, lose_rank=True))
        assert engine.process.wait(30) == 1
        assert engine.process.stderr is not None
        (line,) = engine.process.stderr.read().decode().splitlines()
        assert line.endswith(f"engine[{engine.process.pid}] error: rank 0 is gone")


def test_it_ends_when_the_supervisor_goes_before_any_rank_came(tmp_path: Path) -> None:
    with engine_process(tmp_path) as engine:
        engine.control.close()
        assert engine.process.wait(30) == 0
