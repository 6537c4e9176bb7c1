"""Messages between the supervisor and its children, over the control socket that each child is born with.

The first frame from the supervisor is the child's configuration (its slice of `llmd.config`).
"""

from enum import StrEnum

from msgspec import Struct


class Stage(StrEnum):
    """How far the system is. In order; `FAILED` ends it."""

    STARTING = "starting"
    FETCHING = "fetching"  # download or conversion of the model
    LOADING = "loading"  # weights to their device
    READY = "ready"
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


class ChildProgress(Struct, frozen=True, kw_only=True, tag=True):
    """Child → supervisor: what it is doing."""

    stage: Stage
    detail: str = ""
    progress: float | None = None


class ChildReady(Struct, frozen=True, kw_only=True, tag=True):
    """Child → supervisor: it does its work from now on. A fetcher gives the folder it made."""

    model_dir: str | None = None


class ChildFailed(Struct, frozen=True, tag=True):
    """Child → supervisor: it cannot go on, and a restart would not help. Its process ends after this."""

    message: str


class Line(Struct, frozen=True, tag=True):
    """Child → supervisor: one line for the operator's terminal (the memory ledger, a reduced limit)."""

    text: str


ChildToSupervisor = ChildProgress | ChildReady | ChildFailed | Line
