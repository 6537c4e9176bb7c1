"""Keeps the system running: starts what ended anew, as long as that may help, and drains.

Knows processes and stages only; no request ever comes here.
"""

import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count

import trio

from llmd.config import SECONDS, Config
from llmd.errors import StartupFailed
from llmd.protocol.control import ChildFailed, ChildProgress, ChildReady, ChildToSupervisor, Line, Stage, SystemState
from llmd.supervisor.back_off import BackOff
from llmd.supervisor.processes import END_SIGNALS, Process
from llmd.supervisor.start import (
    EngineGroup,
    FirstChildren,
    Sockets,
    start_engine_group,
    start_fetcher,
    start_server,
)
from llmd.supervisor.system_board import SystemBoard
from llmd.supervisor.terminal import Terminal
from llmd.supervisor.watch import Child, how_ended, name_of

# in a row, without once becoming ready; after that, trying again would only hide the cause
_MAX_FAILED_STARTS = 3
# a server's death cuts its clients, so it may be silent for so many times as long as others
_SERVER_PATIENCE = 3
# for an engine whose worker is gone to end by itself
_ENGINE_GRACE = 1 * SECONDS
# what a server may take beyond the drain timeout before it is killed
_DRAIN_MARGIN = 5 * SECONDS


async def supervise(config: Config, sockets: Sockets, first: FirstChildren, *, model_dir: str | None) -> int:
    """Run the system until it is told to stop or cannot go on. Returns the exit status."""
    state = SystemState(stage=Stage.LOADING if model_dir else Stage.FETCHING, model_dir=model_dir)
    board = SystemBoard(state, num_servers=len(first.servers), terminal=Terminal(config.log))
    return await _Supervisor(config, sockets, board).run(first)


@dataclass(slots=True)
class _Life:
    """What is to be remembered of a server, or of an engine with its workers, after the end."""

    was_ready: bool = False
    failure: str | None = None  # the reason that a process gave for not going on
    end: str = ""  # for the operator: who ended, and how


class _Supervisor:
    def __init__(self, config: Config, sockets: Sockets, board: SystemBoard) -> None:
        self._config = config
        self._sockets = sockets
        self._board = board
        self._num_blocks: int | None = None  # of the first engine: later ones keep its limits

    async def run(self, first: FirstChildren) -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._await_signals, nursery.cancel_scope)
            nursery.start_soon(self._unless_hopeless, self._keep_servers, first, nursery.cancel_scope)
            nursery.start_soon(self._unless_hopeless, self._keep_engine_group, first, nursery.cancel_scope)
        if self._board.draining.is_set():
            self._board.line("ended")
        return 1 if self._board.current.stage is Stage.FAILED else 0

    async def _await_signals(self, everything: trio.CancelScope) -> None:
        """First SIGTERM or SIGINT: drain. The second: end at once."""
        for each in END_SIGNALS:
            # what comes once this receiver is closed changes nothing: everything ends already
            signal.signal(each, lambda *_: None)
        with trio.open_signal_receiver(*END_SIGNALS) as signals:
            # they were held back while nobody could take them
            signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)
            async for _ in signals:
                if self._board.draining.is_set():
                    self._board.line("a second signal: ending at once")
                    everything.cancel()
                    return
                self._board.drain()

    async def _unless_hopeless(
        self, keep: Callable[[FirstChildren], Awaitable[None]], first: FirstChildren, everything: trio.CancelScope
    ) -> None:
        """Keep something running. If that is hopeless, say so: to the clients if there are any, and end if not."""
        try:
            await keep(first)
        except* StartupFailed as failures:
            self._board.fail(_first_message(failures))
            if not self._board.was_ready:
                everything.cancel()
        else:
            # the servers have drained: nobody is left to work for
            everything.cancel()

    async def _keep_servers(self, first: FirstChildren) -> None:
        """Until all of them have drained."""
        async with trio.open_nursery() as nursery:
            for index, server in enumerate(first.servers):
                nursery.start_soon(self._keep_server, server, index)

    async def _keep_server(self, first: Process, index: int) -> None:
        server: Process | None = first
        back_off, num_failed = BackOff(), 0
        while True:
            started = trio.current_time()
            try:
                server = server or start_server(self._config, self._sockets, index=index)
            except OSError as error:
                life = _Life(end=f"no server could be started: {error}")
            else:
                life = await self._run_server(server, num_failed=num_failed)
            if self._board.draining.is_set():
                return
            num_failed = 0 if life.was_ready else num_failed + 1
            if not self._board.was_ready and (life.failure or num_failed == _MAX_FAILED_STARTS):
                raise StartupFailed(life.failure or _never_ready("a server process", num_failed))
            delay = back_off.next_delay(lived=trio.current_time() - started, was_ready=life.was_ready)
            self._board.warning(f"{life.end}: starting another server{_after(delay)}")
            with trio.move_on_after(delay):
                await self._board.draining.wait()
                return
            server = None

    async def _run_server(self, server: Process, *, num_failed: int) -> _Life:
        """Until it ends. One that cannot do its work is ended, unless nobody else is there to tell that to clients."""
        life, pid = _Life(), server.popen.pid

        def take_in(message: ChildToSupervisor) -> None:
            match message:
                case ChildReady():
                    life.was_ready = True
                    self._board.server_ready(pid)
                case ChildFailed(message=text):
                    life.failure = text
                    if self._is_expendable(num_failed):
                        nursery.cancel_scope.cancel()
                    else:
                        self._board.fail(text)
                case _:
                    self._note(message)

        patience = _SERVER_PATIENCE * self._config.supervisor.hang_timeout
        child = Child(server, take_in, hang_timeout=patience, report=self._board.warning)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_state, child)
            nursery.start_soon(self._end_when_overdue, nursery.cancel_scope)
            await child.run()
            nursery.cancel_scope.cancel()
        self._board.server_lost(pid)
        life.end = how_ended(server, reason=life.failure)
        return life

    def _is_expendable(self, num_failed: int) -> bool:
        """Whether a server that cannot do its work may end: somebody must tell the clients when all is lost."""
        board = self._board
        if board.current.stage is Stage.FAILED:
            return False
        return not board.was_ready or board.any_server_ready() or num_failed < _MAX_FAILED_STARTS - 1

    async def _tell_state(self, server: Child) -> None:
        """Send every change. A server that hears of the drain ends by itself."""
        while True:
            changed = self._board.changed
            try:
                await server.tell(self._board.current)
            except trio.BrokenResourceError:
                return  # it is gone: who listens to it sees that too
            await changed.wait()

    async def _end_when_overdue(self, server: trio.CancelScope) -> None:
        await self._board.draining.wait()
        await trio.sleep(self._config.http.drain_timeout + _DRAIN_MARGIN)
        server.cancel()

    async def _keep_engine_group(self, first: FirstChildren) -> None:
        """Fetch the model if need be, then keep an engine group running. Raises StartupFailed when that is hopeless."""
        if first.fetcher:
            self._board.fetched(await self._fetch(first.fetcher))
        group = first.engine_group
        back_off, num_failed = BackOff(), 0
        while True:
            started = trio.current_time()
            try:
                group = group or self._start_engine_group()
            except OSError as error:
                life = _Life(end=f"no engine could be started: {error}")
            else:
                life = await self._run_engine_group(group)
            num_failed = 0 if life.was_ready else num_failed + 1
            # what it says when nothing has ever worked, it would say again
            if life.failure and not self._board.was_ready:
                raise StartupFailed(life.failure)
            if num_failed == _MAX_FAILED_STARTS:
                raise StartupFailed(life.failure or _never_ready("the engine", num_failed))
            delay = back_off.next_delay(lived=trio.current_time() - started, was_ready=life.was_ready)
            self._board.engine_lost(f"{life.end}: starting the engine and its workers again{_after(delay)}")
            await trio.sleep(delay)
            group = None

    def _start_engine_group(self) -> EngineGroup:
        model_dir = self._board.current.model_dir
        assert model_dir is not None
        return start_engine_group(self._config, self._sockets, model_dir=model_dir, num_blocks=self._num_blocks)

    async def _run_engine_group(self, group: EngineGroup) -> _Life:
        """Until one of its processes ends; then none of them is left."""
        life = _Life()
        first_ended: Process | None = None

        async def run(process: Process) -> None:
            nonlocal first_ended
            child = Child(
                process,
                take_in if process is group.engine else take_in_worker,
                hang_timeout=self._config.supervisor.hang_timeout,
                report=self._board.warning,
                suspect=lambda silent: self._board.engine_silent(name_of(process), silent),
            )
            await child.run()
            first_ended = first_ended or process
            if process is not group.engine:
                # cut short by the end of the engine, which has yet to tell the servers what came before
                await trio.sleep(_ENGINE_GRACE)
            nursery.cancel_scope.cancel()

        def take_in(message: ChildToSupervisor) -> None:
            match message:
                case ChildReady(num_blocks=num_blocks):
                    life.was_ready = True
                    self._num_blocks = num_blocks
                    self._board.engine_ready()
                case ChildFailed(message=text):
                    life.failure = text
                case _:
                    self._note(message)

        def take_in_worker(message: ChildToSupervisor) -> None:
            # the engine speaks for its workers
            if not isinstance(message, ChildReady):
                take_in(message)

        async with trio.open_nursery() as nursery:
            for process in group.processes:
                nursery.start_soon(run, process)
        assert first_ended is not None
        life.end = how_ended(first_ended, reason=life.failure)
        return life

    async def _fetch(self, first: Process) -> str:
        """The model's folder. Raises StartupFailed."""
        fetcher, hang_timeout = first, self._config.supervisor.hang_timeout
        result: ChildReady | ChildFailed | None = None

        def take_in(message: ChildToSupervisor) -> None:
            nonlocal result
            if isinstance(message, ChildReady | ChildFailed):
                result = message
                scope.cancel()
            else:
                self._note(message)

        for num_starts in count(1):
            with trio.CancelScope() as scope:
                await Child(fetcher, take_in, hang_timeout=hang_timeout, report=self._board.warning).run()
            match result:
                case ChildReady(model_dir=str(folder)):
                    return folder
                case ChildFailed(message=text):
                    raise StartupFailed(text)
            end = how_ended(fetcher)
            if num_starts == _MAX_FAILED_STARTS:
                raise StartupFailed(f"fetching the model ended without a result: {end}")
            self._board.warning(f"{end}: starting another fetcher")
            fetcher = start_fetcher(self._config)
        raise AssertionError("the loop above has no end")

    def _note(self, message: ChildToSupervisor) -> None:
        match message:
            case ChildProgress():
                self._board.progress(message)
            case Line(text=text):
                self._board.line(text)


def _first_message(failures: BaseExceptionGroup[BaseException]) -> str:
    first = failures.exceptions[0]
    return _first_message(first) if isinstance(first, BaseExceptionGroup) else str(first)


def _never_ready(what: str, num_starts: int) -> str:
    return f"{what} ended {num_starts} times before it was ready; see the log above"


def _after(delay: float) -> str:
    return f" in {delay:g} s" if delay else ""
