"""What a stage has found, as JSON that is whole on disk after every row. Knows nothing of what is measured."""

import json
import math
import os
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

    Rows without an error that an earlier run of the same origin left are kept and not measured again.
    """

    def __init__(self, folder: Path, stage: str, origin: Origin) -> None:
        self._path = path_of(folder, stage)
        self._started = time.monotonic()
        self._result = StageResult(stage, "running", origin)
        if self._path.exists():
            before = read(self._path)
            if replace(before.origin, date=origin.date) == origin:
                rows = [row for row in before.rows if row.error is None]
                self._result = replace(self._result, rows=rows)
        self._save()

    @property
    def rows(self) -> dict[str, Values]:
        """What is known so far, by name."""
        return {row.name: row.values for row in self._result.rows if row.error is None}

    def row(self, name: str, measure: Callable[[], Values]) -> None:
        """Whatever goes wrong in `measure` is this row's error; the stage goes on."""
        if name in self.rows:
            return
        started = time.monotonic()
        try:
            values, error = _finite(measure()), None
        except Exception as failure:
            traceback.print_exc()
            values, error = {}, f"{type(failure).__name__}: {failure}"
        row = Row(name, values, round(time.monotonic() - started, 3), error)
        self._result = replace(self._result, rows=[*self._result.rows, row])
        self._save()
        print_row(self._result.stage, row)

    def finish(self) -> StageResult:
        self._result = replace(self._result, status="done")
        self._save()
        return self._result

    def _save(self) -> None:
        self._result = replace(self._result, seconds=round(time.monotonic() - self._started, 3))
        write(self._path, self._result)


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
