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
from llmd.protocol.control import Beat, ChildReady, ChildToSupervisor
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.generation import EngineReady, EngineToServer, FinishReason, GenerateRequest, SamplingParams
from llmd.protocol.steps import RankReady
from tests.fakes import VOCAB_SIZE, FakeRank, expected_completion, serve_fake_rank

BLOCK_SIZE = 4


@dataclass
class EngineProcess:
    process: subprocess.Popen[bytes]
    control: socket.socket
    rank: socket.socket  # the rank's end
    server_path: str

    def messages(self) -> Iterator[ChildToSupervisor]:
        """What it tells the supervisor, signs of life included, until it ends."""
        decoder: FrameDecoder[ChildToSupervisor] = FrameDecoder(ChildToSupervisor)
        self.control.settimeout(30)
        while data := self.control.recv(1000):
            yield from decoder.feed(data)


@contextmanager
def engine_process(folder: Path, *, step_timeout: float = 300) -> Iterator[EngineProcess]:
    """The process, told its configuration; killed at the end if it still runs."""
    ours, theirs = socket.socketpair()
    rank, engine_end = socket.socketpair()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "server"))
    listener.listen()
    fds = [inherited.fileno() for inherited in (theirs, engine_end, listener)]
    process = subprocess.Popen([sys.executable, "-m", "llmd.engine", str(fds[0])], pass_fds=fds, stderr=subprocess.PIPE)
    for inherited in (theirs, engine_end, listener):
        inherited.close()
    config = EngineConfig(
        cache=CacheConfig(block_size=BLOCK_SIZE),
        scheduler=SchedulerConfig(),
        server_listen_fd=fds[2],
        rank_fds=(fds[1],),
        step_timeout=step_timeout,
    )
    ours.sendall(encode_frame(config))
    with process, ours, rank:
        try:
            yield EngineProcess(process, ours, rank, str(folder / "server"))
        finally:
            process.kill()


async def serve_rank(engine: EngineProcess, scope: trio.CancelScope) -> None:
    with scope:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(engine.rank))
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
                    for event in [] if isinstance(message, EngineReady) else message.all_events():
                        token_ids += event.token_ids
                        finish = event.finish
            assert received[0] == EngineReady(
                max_model_len=100, block_size=BLOCK_SIZE, num_blocks=50, vocab_size=VOCAB_SIZE
            )
            assert (token_ids, finish) == expected_completion(request)
            said = next(message for message in engine.messages() if message != Beat())
            assert said == ChildReady(num_blocks=50)
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


def test_a_rank_that_hangs_in_a_step_is_lost(tmp_path: Path) -> None:
    request = GenerateRequest(request_id=3, prompt_token_ids=[5], sampling=SamplingParams(max_tokens=9, seed=0))
    with (
        engine_process(tmp_path, step_timeout=1) as engine,
        socket.socket(socket.AF_UNIX) as server,
    ):
        engine.rank.sendall(encode_frame(RankReady(rank=0, num_blocks=50, max_model_len=100, vocab_size=VOCAB_SIZE)))
        # idle, it waits for as long as it takes
        beats_while_idle = 0
        for message in engine.messages():
            beats_while_idle += message == Beat()
            if beats_while_idle == 3:
                break
        server.connect(engine.server_path)
        server.sendall(encode_frame(request))
        assert engine.process.wait(30) == 1
        assert engine.process.stderr is not None
        assert "rank 0 has not finished a step for 1 s" in engine.process.stderr.read().decode()


def test_a_rank_that_dies_while_it_loads_is_lost(tmp_path: Path) -> None:
    with engine_process(tmp_path) as engine:
        engine.rank.close()
        assert engine.process.wait(30) == 1


def test_it_gives_signs_of_life_before_there_is_anything_to_do(tmp_path: Path) -> None:
    with engine_process(tmp_path) as engine:
        assert next(engine.messages()) == Beat()


def test_it_ends_when_the_supervisor_goes_before_any_rank_came(tmp_path: Path) -> None:
    with engine_process(tmp_path) as engine:
        engine.control.close()
        assert engine.process.wait(30) == 0
