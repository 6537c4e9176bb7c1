"""Keeps the system running: reads what the children say, tells the servers the truth, replaces what dies, drains.

Knows processes and stages only; no request ever comes here.
"""

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import trio

from llmd.config import SECONDS, Config
from llmd.errors import StartupFailed
from llmd.protocol.control import ChildFailed, ChildProgress, ChildReady, ChildToSupervisor, Line, Stage, SystemState
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.supervisor.processes import Process
from llmd.supervisor.start import EngineGroup, FirstChildren, Sockets, start_engine_group, start_server
from llmd.supervisor.terminal import Terminal

# a group that lived this long was healthy: its death starts the back-off anew
_HEALTHY_AFTER = 60 * SECONDS
_FIRST_DELAY = 0.1 * SECONDS
_MAX_DELAY = 10 * SECONDS
# without once becoming ready; after that, trying again would only hide the cause
_MAX_FAILED_STARTS = 3
# what a server may take beyond the drain timeout before it is killed
_DRAIN_MARGIN = 5 * SECONDS


async def supervise(config: Config, sockets: Sockets, first: FirstChildren, *, model_dir: str | None) -> int:
    """Run the system until it is told to stop or cannot go on. Returns the exit status."""
    return await _Supervisor(config, sockets, model_dir=model_dir).run(first)


class _Supervisor:
    def __init__(self, config: Config, sockets: Sockets, *, model_dir: str | None) -> None:
        self._config = config
        self._sockets = sockets
        self._terminal = Terminal(config.log)
        stage = Stage.LOADING if model_dir else Stage.FETCHING
        self._state = SystemState(stage=stage, model_dir=model_dir)
        self._state_changed = trio.Event()
        self._draining = False
        # ready is who can answer: an engine with its ranks, and a server that knows the model's text side
        self._engine_is_ready = False
        self._server_is_ready = False
        self._was_ready = False

    async def run(self, first: FirstChildren) -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._await_signals, nursery.cancel_scope)
            nursery.start_soon(self._unless_hopeless, self._keep_servers, first, nursery.cancel_scope)
            nursery.start_soon(self._unless_hopeless, self._keep_engine_group, first, nursery.cancel_scope)
        return 1 if self._state.stage is Stage.FAILED else 0

    async def _unless_hopeless(
        self, keep: Callable[[FirstChildren], Awaitable[None]], first: FirstChildren, everything: trio.CancelScope
    ) -> None:
        """Keep something running. If that is hopeless, say so: to the clients if there are any, and end if not."""
        try:
            await keep(first)
        except* StartupFailed as failures:
            self._set_state(stage=Stage.FAILED, detail=_first_message(failures), progress=None)
            if not self._was_ready:
                everything.cancel()
        else:
            # the servers have drained: nobody is left to work for
            everything.cancel()

    def _set_state(self, **changes: object) -> None:
        state = msgspec.structs.replace(self._state, **changes)
        if state == self._state:
            return
        self._state = state
        self._terminal.show(state)
        self._state_changed.set()
        self._state_changed = trio.Event()

    async def _await_signals(self, everything: trio.CancelScope) -> None:
        """First SIGTERM or SIGINT: drain. The second: end at once."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                if self._draining:
                    everything.cancel()
                    return
                self._draining = True
                self._set_state(
                    stage=Stage.DRAINING,
                    detail="draining: running requests finish, new ones are refused",
                    progress=None,
                )

    def _note_ready(self) -> None:
        if self._engine_is_ready and self._server_is_ready and not self._draining:
            self._was_ready = True
            self._set_state(stage=Stage.READY, detail="", progress=None)

    async def _keep_servers(self, first: FirstChildren) -> None:
        """Until all of them have drained."""
        async with trio.open_nursery() as nursery:
            for index, server in enumerate(first.servers):
                nursery.start_soon(self._keep_server, server, index)

    async def _keep_server(self, server: Process, index: int) -> None:
        delay = _FIRST_DELAY
        while True:
            started = trio.current_time()
            async with _control(server) as control, trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_state, server, control)
                async for message in _messages(control):
                    self._note(message)
                    if isinstance(message, ChildReady):
                        self._server_is_ready = True
                        self._note_ready()
                nursery.cancel_scope.cancel()
            if self._draining:
                return
            delay = _FIRST_DELAY if trio.current_time() - started > _HEALTHY_AFTER else min(2 * delay, _MAX_DELAY)
            self._terminal.line(f"a server process ended ({_exit_text(server)}); starting another")
            await trio.sleep(delay)
            server = start_server(self._config, self._sockets, index=index)

    async def _tell_state(self, server: Process, control: trio.SocketStream) -> None:
        """Send every change. A server that hears of the drain ends by itself, or is ended when its time is over."""
        while True:
            changed, state = self._state_changed, self._state
            try:
                await control.send_all(encode_frame(state))
            except trio.BrokenResourceError:
                return  # it died: its reader sees the end and replaces it
            if state.stage is Stage.DRAINING:
                await trio.sleep(self._config.http.drain_timeout + _DRAIN_MARGIN)
                server.popen.kill()
                return
            await changed.wait()

    async def _keep_engine_group(self, first: FirstChildren) -> None:
        """Fetch the model if need be, then keep an engine group running. Raises StartupFailed when that is hopeless."""
        if first.fetcher:
            await self._fetch(first.fetcher)
        group = first.engine_group
        delay, failed_starts = _FIRST_DELAY, 0
        while True:
            if group is None:
                assert self._state.model_dir is not None
                group = start_engine_group(self._config, self._sockets, model_dir=self._state.model_dir)
            started = trio.current_time()
            was_ready = await self._run_engine_group(group)
            lived = trio.current_time() - started
            failed_starts = 0 if was_ready else failed_starts + 1
            if failed_starts == _MAX_FAILED_STARTS:
                raise StartupFailed(f"the engine ended {failed_starts} times before it was ready; see the log above")
            delay = _FIRST_DELAY if lived > _HEALTHY_AFTER else min(2 * delay, _MAX_DELAY)
            if not self._draining:
                self._set_state(
                    stage=Stage.RESTARTING,
                    detail="the engine is being restarted",
                    progress=None,
                    restarts=self._state.restarts + 1,
                )
            await trio.sleep(delay)
            group = None

    async def _fetch(self, fetcher: Process) -> None:
        async with _control(fetcher) as control:
            async for message in _messages(control):
                self._note(message)
                if isinstance(message, ChildReady):
                    self._set_state(stage=Stage.LOADING, detail="", progress=None, model_dir=message.model_dir)
                    return
        raise StartupFailed(f"fetching the model ended without a result ({_exit_text(fetcher)})")

    async def _run_engine_group(self, group: EngineGroup) -> bool:
        """Until one of its processes ends; then none of them is left. Returns whether it ever was ready."""
        was_ready = False

        async def watch(process: Process, scope: trio.CancelScope) -> None:
            nonlocal was_ready
            async with _control(process) as control:
                async for message in _messages(control):
                    self._note(message)
                    if isinstance(message, ChildReady) and process is group.engine:
                        was_ready = self._engine_is_ready = True
                        self._note_ready()
            if not scope.cancel_called:
                self._terminal.line(f"{process.name} ended ({_exit_text(process)})")
            scope.cancel()

        async with trio.open_nursery() as nursery:
            for process in group.processes:
                nursery.start_soon(watch, process, nursery.cancel_scope)
        self._engine_is_ready = False
        return was_ready

    def _note(self, message: ChildToSupervisor) -> None:
        match message:
            case ChildProgress(stage=stage, detail=detail, progress=progress) if not self._draining:
                if self._state.stage not in (Stage.READY, Stage.RESTARTING):
                    self._set_state(stage=stage, detail=detail, progress=progress)
                elif self._state.stage is Stage.RESTARTING:
                    self._set_state(detail=detail, progress=progress)
            case ChildFailed(message=text):
                raise StartupFailed(text)
            case Line(text=text):
                self._terminal.line(text)


@asynccontextmanager
async def _control(process: Process) -> AsyncIterator[trio.SocketStream]:
    """The child's control socket as a stream; on leaving, the child is gone and reaped, however we leave."""
    process.control.setblocking(False)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(process.control))
    try:
        yield stream
    finally:
        process.popen.kill()
        with trio.CancelScope(shield=True):
            # a killed process is gone within moments; a thread so that those do not stop the others
            await trio.to_thread.run_sync(process.popen.wait)
            await trio.aclose_forcefully(stream)


async def _messages(control: trio.SocketStream) -> AsyncIterator[ChildToSupervisor]:
    """What the child says, until it is gone."""
    decoder: FrameDecoder[ChildToSupervisor] = FrameDecoder(ChildToSupervisor)
    while True:
        try:
            data = await control.receive_some()
        except trio.BrokenResourceError:
            return
        if not data:
            return
        for message in decoder.feed(data):
            yield message


def _first_message(failures: BaseExceptionGroup[BaseException]) -> str:
    first = failures.exceptions[0]
    return _first_message(first) if isinstance(first, BaseExceptionGroup) else str(first)


def _exit_text(process: Process) -> str:
    status = process.popen.poll()
    if status is None:
        return "still running"
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
