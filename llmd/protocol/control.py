"""Messages between the supervisor and its children, over the control socket that each child is born with.

The first frame from the supervisor is the child's configuration (its slice of `llmd.config`).
"""

from enum import StrEnum

from msgspec import Struct

BEAT_INTERVAL = 1.0  # seconds from one `Beat` of a child to the next


class Stage(StrEnum):
    """How far the system is. In order; `FAILED` ends it."""

    STARTING = "starting"
    FETCHING = "fetching"  # download or conversion of the model
    LOADING = "loading"  # weights to their device
    READY = "ready"
    STALLED = "stalled"  # the engine or a rank gives no sign of life, and is replaced if that goes on
    RESTARTING = "restarting"  # the engine died and is being replaced
    DRAINING = "draining"
    FAILED = "failed"


class SystemState(Struct, frozen=True, kw_only=True):
    """Supervisor → server: the whole truth as of now. Sent at once and at every change."""

    stage: Stage
    detail: str = ""  # for people: "loading weights", "downloading model.safetensors"
    progress: float | None = None  # 0 … 1 of this stage, where known
    model_dir: str | None = None  # the resolved safetensors folder, once there is one
    restarts: int = 0  # of the engine, since the start
    load_seconds: float | None = None  # that the engine's last start took; None before there was one


class ChildProgress(Struct, frozen=True, kw_only=True, tag=True):
    """Child → supervisor: what it is doing."""

    stage: Stage
    detail: str = ""
    progress: float | None = None


class ChildReady(Struct, frozen=True, kw_only=True, tag=True):
    """Child → supervisor: it does its work from now on. A server says so each time that its `/health` becomes 200."""

    model_dir: str | None = None  # of a fetcher: the folder it made
    num_blocks: int | None = None  # of an engine: KV-cache blocks that every rank has


class ChildFailed(Struct, frozen=True, tag=True):
    """Child → supervisor: it cannot go on, and a restart would not help. Its process ends after this."""

    message: str


class Beat(Struct, frozen=True, tag=True):
    """Child → supervisor, once a second: the process lives, and what sends this is not stuck."""


class Line(Struct, frozen=True, tag=True):
    """Child → supervisor: one line for the operator's terminal (the memory ledger, a reduced limit)."""

    text: str


ChildToSupervisor = ChildProgress | ChildReady | ChildFailed | Beat | Line
