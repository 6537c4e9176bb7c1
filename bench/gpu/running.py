"""Stages one after another, each in a process of its own with a deadline: one that overruns is cut, the next one runs.

Knows nothing of what stages do, and needs no torch.
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bench.gpu import results
from bench.gpu.results import GO_ON_STATUS, Origin, StageResult, Status, path_of

# Between asking a stage to end and ending it.
_GRACE = 3.0  # seconds


@dataclass(frozen=True, slots=True)
class Stage:
    """A command that writes `FOLDER/NAME.json`, and the seconds it may take.

    It is run again, with `--go-on`, where it ends with GO_ON_STATUS or in the middle of a row.
    """

    name: str
    command: Sequence[str]
    deadline: float


def run_stages(stages: Sequence[Stage], folder: Path, *, origin: Origin, limit: float) -> bool:
    """Run what is not done yet, within `limit` seconds together; True if all of it is good.

    `origin` is written where a stage ended before it could say so itself.
    """
    ends = time.monotonic() + limit
    good = True
    for stage in stages:
        before = _read(folder, stage.name)
        if before is not None and before.status == "done" and before.is_good:
            print(f"{stage.name:<12}done already: {path_of(folder, stage.name)}", flush=True)
            continue
        result = _run(stage, folder, origin, seconds=min(stage.deadline, ends - time.monotonic()))
        print(f"{stage.name:<12}{result.status} after {result.seconds:.1f} s{_because(result)}", flush=True)
        good &= result.is_good
    return good


def _run(stage: Stage, folder: Path, origin: Origin, *, seconds: float) -> StageResult:
    started = time.monotonic()
    status: Status = "cut"
    error = None
    if seconds > 0:
        returned = _returned(stage.command, seconds)
        while _can_go_on(returned, folder, stage.name):
            returned = _returned((*stage.command, "--go-on"), started + seconds - time.monotonic())
        if returned is None:
            error = f"not done after {seconds:.0f} s"
        else:
            status, error = ("done", None) if returned == 0 else ("failed", f"status {returned}")
    else:
        error = "no time was left"
    result = _read(folder, stage.name) or StageResult(stage.name, "running", origin)
    if result.status != "done":
        took = round(time.monotonic() - started, 3)
        result = replace(result, status="failed" if status == "done" else status, error=error, seconds=took)
        results.write(path_of(folder, stage.name), result)
    return result


def _can_go_on(returned: int | None, folder: Path, name: str) -> bool:
    """Whether there is a row to go on behind. One that was being measured counts as failed."""
    if returned in (0, None):
        return False
    result = _read(folder, name)
    return returned == GO_ON_STATUS or (result is not None and result.is_in_row)


def _returned(command: Sequence[str], seconds: float) -> int | None:
    """Exit status; None if it was ended."""
    process = subprocess.Popen(command, process_group=0)
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the stage and all that it has started and that has stayed in its group."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(folder: Path, stage: str) -> StageResult | None:
    path = path_of(folder, stage)
    return results.read(path) if path.exists() else None


def _because(result: StageResult) -> str:
    if result.error:
        return f": {result.error}"
    failed = sum(row.error is not None for row in result.rows)
    return f", {failed} of {len(result.rows)} rows failed" if failed else f", {len(result.rows)} rows"
