"""What the system is as a whole, by what happened to its parts. The operator hears each change at once.

Knows stages, not processes.
"""

import logging
import time

import msgspec
import trio

from llmd.protocol.control import ChildProgress, Stage, SystemState
from llmd.supervisor.terminal import Terminal


class SystemBoard:
    """The latest `SystemState`. A drain may still become a failure; after a failure, only a drain is news."""

    def __init__(self, state: SystemState, *, num_servers: int, terminal: Terminal) -> None:
        self._state = state
        self._changed = trio.Event()
        self._num_servers = num_servers
        self._terminal = terminal
        self._ready_servers: set[int] = set()  # pids of those whose /health says 200
        self._silent: set[str] = set()  # names of those on the engine's side that give no sign of life
        self._announced = False  # that all are ready, since the engine's latest start
        self._began_loading = time.monotonic()
        self.was_ready = False  # ever: clients may be there
        self.draining = trio.Event()

    @property
    def current(self) -> SystemState:
        return self._state

    @property
    def changed(self) -> trio.Event:
        """Set at the next change."""
        return self._changed

    def line(self, text: str) -> None:
        """For the operator."""
        self._terminal.line(text)

    def warning(self, text: str) -> None:
        """For the operator, of what should not have happened."""
        self._terminal.line(text, level=logging.WARNING)

    def progress(self, message: ChildProgress) -> None:
        """A child says what it is doing: of interest while nothing works yet, or again."""
        match self._state.stage:
            case Stage.STARTING | Stage.FETCHING | Stage.LOADING:
                self._set(stage=message.stage, detail=message.detail, progress=message.progress)
            case Stage.RESTARTING:
                self._set(detail=message.detail, progress=message.progress)

    def fetched(self, model_dir: str) -> None:
        """The model's folder is there."""
        self._began_loading = time.monotonic()
        if self._is_open():
            self._set(stage=Stage.LOADING, detail="", progress=None)
        self._set(model_dir=model_dir)

    def engine_ready(self) -> None:
        """The engine works. Each server says for itself when it does, see `server_ready`."""
        if self._is_open():
            load_seconds = time.monotonic() - self._began_loading
            self._set(stage=Stage.READY, detail="", progress=None, load_seconds=load_seconds)

    def engine_silent(self, name: str, silent: bool) -> None:
        """The process of this name, on the engine's side, gives no sign of life, or gives signs again."""
        if silent:
            self._silent.add(name)
        else:
            self._silent.discard(name)
        if self._state.stage not in (Stage.READY, Stage.STALLED):
            return
        if not silent:
            self.warning(f"{name} gives signs of life again")
        if self._silent:
            self._set(stage=Stage.STALLED, detail=f"{min(self._silent)} gives no sign of life")
        else:
            self._set(stage=Stage.READY, detail="")

    def engine_lost(self, report: str) -> None:
        """The engine ended, and is being replaced: `report` says how it ended and what follows."""
        self._terminal.restart(report)
        self._began_loading = time.monotonic()
        self._ready_servers.clear()
        self._silent.clear()
        self._announced = False
        restarts = self._state.restarts + 1
        if self._is_open():
            self._set(stage=Stage.RESTARTING, detail=report, progress=None, restarts=restarts)
        else:
            self._set(restarts=restarts)

    def server_ready(self, pid: int) -> None:
        """The `/health` of this server says 200."""
        self.was_ready = True
        self._ready_servers.add(pid)
        if self._state.stage is Stage.READY and len(self._ready_servers) == self._num_servers and not self._announced:
            self._announced = True
            self._terminal.show(self._state)

    def server_lost(self, pid: int) -> None:
        """This server ended."""
        self._ready_servers.discard(pid)

    def any_server_ready(self) -> bool:
        return bool(self._ready_servers)

    def drain(self) -> None:
        """The operator wants an end."""
        self.draining.set()
        detail = "running requests finish, new ones are refused"
        self._set(stage=Stage.DRAINING, detail=detail, progress=None)

    def fail(self, detail: str) -> None:
        """It cannot go on, for this reason; the first one counts."""
        if self._state.stage is not Stage.FAILED:
            self._set(stage=Stage.FAILED, detail=detail, progress=None)

    def _is_open(self) -> bool:
        return self._state.stage not in (Stage.DRAINING, Stage.FAILED)

    def _set(self, **changes: object) -> None:
        state = msgspec.structs.replace(self._state, **changes)
        if state == self._state:
            return
        self._state = state
        # that it is ready is shown once the servers have heard it
        if state.stage is not Stage.READY:
            self._terminal.show(state)
        self._changed.set()
        self._changed = trio.Event()
