"""From configuration to sockets and child processes. No event loop: this runs before the supervisor imports one."""

import shutil
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from llmd.config import Config, EngineConfig, FetchConfig, ServerConfig, WorkerConfig
from llmd.supervisor.processes import Process, listen_unix, spawn


@dataclass(frozen=True, slots=True)
class Sockets:
    """What the supervisor holds for as long as it lives, whoever dies: nobody's port ever closes."""

    http: tuple[socket.socket, ...]
    run_dir: Path  # private to this user; the unix sockets lie here
    servers: socket.socket  # where an engine accepts servers
    opened_at: float  # unix time, seconds

    @classmethod
    def open(cls, http: tuple[socket.socket, ...]) -> "Sockets":
        run_dir = Path(tempfile.mkdtemp(prefix="llmd-"))
        servers = listen_unix(run_dir / "servers.sock")
        return cls(http=http, run_dir=run_dir, servers=servers, opened_at=time.time())

    def close(self) -> None:
        for listener in (*self.http, self.servers):
            listener.close()
        shutil.rmtree(self.run_dir, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """An engine and its ranks. They live and die together: what they hold can be computed again."""

    engine: Process
    workers: tuple[Process, ...]

    @property
    def processes(self) -> tuple[Process, ...]:
        return (self.engine, *self.workers)


@dataclass(frozen=True, slots=True)
class FirstChildren:
    """The children that are started at once."""

    servers: tuple[Process, ...]
    fetcher: Process | None  # if the model is not yet there
    engine_group: EngineGroup | None  # if it is


def start_first_children(config: Config, sockets: Sockets, *, model_dir: Path | None) -> FirstChildren:
    """Start everything that can start now. The slowest first: a worker has torch to import."""
    engine_group = start_engine_group(config, sockets, model_dir=str(model_dir)) if model_dir else None
    fetcher = None if model_dir else start_fetcher(config)
    servers = tuple(start_server(config, sockets, index=index) for index in range(config.http.num_frontends))
    return FirstChildren(servers=servers, fetcher=fetcher, engine_group=engine_group)


def start_fetcher(config: Config) -> Process:
    return spawn(FetchConfig(model=config.model, log=config.log))


def start_server(config: Config, sockets: Sockets, *, index: int) -> Process:
    fds = tuple(listener.fileno() for listener in sockets.http)
    server = ServerConfig(
        model=config.model,
        http=config.http,
        listen_fds=fds,
        engine_path=sockets.servers.getsockname(),
        log=config.log,
        index=index,
        figures_dir=str(sockets.run_dir),
        started_at=sockets.opened_at,
    )
    return spawn(server, pass_fds=fds)


def start_engine_group(
    config: Config, sockets: Sockets, *, model_dir: str, num_blocks: int | None = None
) -> EngineGroup:
    """Engine and worker, with a socket between them that nobody else has: when one ends, the other reads the end.

    `num_blocks` of the KV cache are what the last engine had; None if there was none.
    """
    engine_end, worker_end = socket.socketpair()
    with engine_end, worker_end:
        worker = WorkerConfig(
            model=config.model,
            model_dir=model_dir,
            cache=config.cache,
            scheduler=config.scheduler,
            rank=0,
            engine_fd=worker_end.fileno(),
            num_blocks=num_blocks,
            log=config.log,
        )
        engine = EngineConfig(
            cache=config.cache,
            scheduler=config.scheduler,
            server_listen_fd=sockets.servers.fileno(),
            rank_fds=(engine_end.fileno(),),
            step_timeout=config.supervisor.step_timeout,
            log=config.log,
        )
        workers = (spawn(worker, pass_fds=(worker.engine_fd,)),)
        return EngineGroup(engine=spawn(engine, pass_fds=(engine.server_listen_fd, *engine.rank_fds)), workers=workers)
