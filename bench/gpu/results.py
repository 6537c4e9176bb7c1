"""What a stage has found, as JSON that is whole on disk after every row. Knows nothing of what is measured."""

import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

Value = float | str | bool | None
Values = Mapping[str, Value]
# running: it still is, or was ended from outside. cut: at its deadline. failed: it ended before its last row.
Status = Literal["running", "done", "cut", "failed"]
# Of a stage's process that cannot use its device any more: its last row says why, and another one goes on behind it.
GO_ON_STATUS = 75
# A row's error while it is measured, and ever after if its process ended then.
UNFINISHED = "its process ended before it was done"


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. `error`: why there is none."""

    name: str
    values: dict[str, Value]
    seconds: float  # that it took to make
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where and when a stage ran. Rows of different origins are never mixed, except for the date."""

    date: str  # YYYY-MM-DD
    device: str  # as its driver names it
    commit: str  # of llmd, "" where it is not known
    rehearsal: bool  # true: no figure in it means anything


@dataclass(frozen=True, slots=True)
class StageResult:
    """A stage's file."""

    stage: str
    status: Status
    origin: Origin
    seconds: float = 0.0  # of the last run
    error: str | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def is_in_row(self) -> bool:
        """Whether a row is being measured, or its process ended meanwhile."""
        return bool(self.rows) and self.rows[-1].error == UNFINISHED

    @property
    def is_good(self) -> bool:
        return self.status == "done" and not any(row.error for row in self.rows)


def path_of(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.json"


def read(path: Path) -> StageResult:
    """Raises ValueError, KeyError or TypeError for a file that is none of ours."""
    found = json.loads(path.read_text())
    found["origin"] = Origin(**found["origin"])
    found["rows"] = [Row(**row) for row in found["rows"]]
    return StageResult(**found)


def write(path: Path, result: StageResult) -> None:
    """Whole or not at all: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    half.write_text(json.dumps(asdict(result), indent=1) + "\n")
    os.replace(half, path)


class Recorder:
    """Takes a stage's measurements one by one: each is printed and on disk before the next begins.

    Rows without an error that an earlier run of the same origin left are kept and not measured again; with
    `goes_on`, those with one too: they are of this run. is_usable: asked when a row has failed, whether what is
    measured can still be used. limit: seconds of a row. Where one of both says no, the process ends with GO_ON_STATUS.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        origin: Origin,
        *,
        goes_on: bool = False,
        is_usable: Callable[[], bool] = lambda: True,
        limit: float | None = None,
    ) -> None:
        self._path = path_of(folder, stage)
        self._started = time.monotonic()
        self._is_usable = is_usable
        self._limit = limit
        self._ending = threading.Lock()  # a row
        self._result = StageResult(stage, "running", origin)
        if self._path.exists():
            before = read(self._path)
            if replace(before.origin, date=origin.date) == origin:
                rows = [row for row in before.rows if goes_on or row.error is None]
                self._result = replace(self._result, rows=rows)
                if goes_on and before.is_in_row:
                    print_row(stage, rows[-1])
        self._save()

    @property
    def rows(self) -> dict[str, Values]:
        """What is known so far, by name."""
        return {row.name: row.values for row in self._result.rows if row.error is None}

    def row(self, name: str, measure: Callable[[], Values], *, is_limited: bool = True) -> None:
        """Whatever goes wrong in `measure` is this row's error; the stage goes on."""
        if any(row.name == name for row in self._result.rows):
            return
        started = time.monotonic()
        self._begin(name)
        watch = threading.Timer(self._limit or 0.0, self._give_up, (name, started))
        watch.daemon = True
        if self._limit is not None and is_limited:
            watch.start()
        try:
            values, error = _finite(measure()), None
        except Exception as failure:
            traceback.print_exc()
            values, error = {}, f"{type(failure).__name__}: {failure}"
        watch.cancel()
        with self._ending:
            self._end(Row(name, values, round(time.monotonic() - started, 3), error))
        if error is not None and not self._is_usable():
            _leave()

    def _give_up(self, name: str, started: float) -> None:
        """The thread that measures waits for a device that may never answer."""
        with self._ending:
            if self._result.rows[-1] == Row(name, {}, 0.0, UNFINISHED):
                self._end(Row(name, {}, round(time.monotonic() - started, 3), f"hangs: not done after {self._limit} s"))
                _leave()

    def _begin(self, name: str) -> None:
        self._result = replace(self._result, rows=[*self._result.rows, Row(name, {}, 0.0, UNFINISHED)])
        self._save()

    def _end(self, row: Row) -> None:
        self._result = replace(self._result, rows=[*self._result.rows[:-1], row])
        self._save()
        print_row(self._result.stage, row)

    def finish(self) -> StageResult:
        self._result = replace(self._result, status="done")
        self._save()
        return self._result

    def _save(self) -> None:
        self._result = replace(self._result, seconds=round(time.monotonic() - self._started, 3))
        write(self._path, self._result)


def _leave() -> None:
    """At once: what would be tidied up waits for the device too, or fails with it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(GO_ON_STATUS)


def _finite(values: Values) -> dict[str, Value]:
    """NaN and infinity are no JSON, and no measurement. Raises ValueError."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    return dict(values)


def print_row(stage: str, row: Row) -> None:
    cells = "  ".join(f"{name} {shown(value)}" for name, value in row.values.items() if value is not None)
    print(f"{stage:<12}{row.name:<44}{f'FAILED {row.error}' if row.error else cells}", flush=True)


def shown(value: Value) -> str:
    """Three significant digits; whole numbers whole."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
