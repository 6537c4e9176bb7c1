"""Stages of gpu-check as processes: each has its deadline, leaves its JSON, and is not run twice."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from bench.gpu import results
from bench.gpu.results import Origin, Recorder, Row, StageResult, path_of
from bench.gpu.running import Stage, run_stages

ORIGIN = Origin("2026-11-22", "a device", "abc", rehearsal=True)
# A stage that measures the given rows, in the manner of `bench.gpu.stage`; at "hang" it starts a process and hangs.
PROGRAM = """
import os, subprocess, sys, time
from pathlib import Path
from bench.gpu.results import Origin, Recorder
goes_on = sys.argv[-1] == "--go-on"
lost = []
recorder = Recorder(
    Path(sys.argv[1]), sys.argv[2], Origin("2026-11-22", "a device", "abc", True),
    goes_on=goes_on, is_usable=lambda: not lost, limit=5.0,
)
def measure(name):
    if name == "crash": os.kill(os.getpid(), 6)
    if name == "stuck": time.sleep(600)
    if name == "lose the device": lost.append(1)
    if lost: raise RuntimeError("an illegal memory access was encountered")
    return {"value": 1 / (name != "wrong")}
for name in sys.argv[3:len(sys.argv) - goes_on]:
    if name == "hang":
        Path(sys.argv[1], "pid").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
        time.sleep(600)
    if name == "die": os._exit(7)
    recorder.row(name, lambda: measure(name))
recorder.finish()
"""


def stage(folder: Path, name: str, *rows: str, deadline: float = 60.0) -> Stage:
    return Stage(name, (sys.executable, "-c", PROGRAM, str(folder), name, *rows), deadline)


def run(folder: Path, *stages: Stage, limit: float = 100.0) -> bool:
    return run_stages(stages, folder, origin=ORIGIN, limit=limit)


def result(folder: Path, name: str) -> StageResult:
    return msgspec.json.decode(path_of(folder, name).read_bytes(), type=StageResult)


def has_ended(pid: int) -> bool:
    """Gone, or dead and not yet reaped."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_stage_that_overruns_is_cut_the_next_one_runs_and_it_goes_on_behind_its_last_row(tmp_path: Path) -> None:
    stages = stage(tmp_path, "slow", "first", "hang", deadline=5.0), stage(tmp_path, "next", "only")
    assert not run(tmp_path, *stages)
    cut = result(tmp_path, "slow")
    assert (cut.status, cut.error) == ("cut", "not done after 5 s")
    assert [row.name for row in cut.rows] == ["first"]
    assert result(tmp_path, "next").is_good
    assert has_ended(int((tmp_path / "pid").read_text()))

    assert run(tmp_path, stage(tmp_path, "slow", "first", "second"))
    after = result(tmp_path, "slow")
    assert (after.status, after.error) == ("done", None)
    assert after.rows[0] == cut.rows[0]
    assert [row.name for row in after.rows] == ["first", "second"]


def test_what_is_done_is_not_done_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, stage(tmp_path, "one", "row"))
    before = path_of(tmp_path, "one").stat()
    assert run(tmp_path, stage(tmp_path, "one", "row", "more"))
    assert path_of(tmp_path, "one").stat().st_mtime_ns == before.st_mtime_ns
    assert "done already" in capfd.readouterr().out


def test_a_row_that_fails_is_named_and_measured_again_next_time(tmp_path: Path) -> None:
    assert not run(tmp_path, stage(tmp_path, "one", "wrong", "right"))
    wrong, right = result(tmp_path, "one").rows
    assert wrong.error == "ZeroDivisionError: division by zero"
    assert right == Row("right", {"value": 1.0}, right.seconds)
    assert not run(tmp_path, stage(tmp_path, "one", "wrong", "right"))
    assert [row.name for row in result(tmp_path, "one").rows] == ["right", "wrong"]


def test_a_stage_that_dies_has_failed_with_its_status(tmp_path: Path) -> None:
    assert not run(tmp_path, stage(tmp_path, "one", "row", "die"))
    died = result(tmp_path, "one")
    assert (died.status, died.error, len(died.rows)) == ("failed", "status 7", 1)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("lose the device", "RuntimeError: an illegal memory access was encountered"),
        ("crash", "its process ended before it was done"),
        ("stuck", "hangs: not done after 5.0 s"),
    ],
)
def test_what_ends_a_process_or_its_device_is_one_row_that_failed(
    fault: str, error: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not run(tmp_path, stage(tmp_path, "one", "first", "wrong", fault, "last"))
    found = result(tmp_path, "one")
    assert found.status == "done"
    assert [row.name for row in found.rows] == ["first", "wrong", fault, "last"]
    assert [row.error for row in found.rows] == [None, "ZeroDivisionError: division by zero", error, None]
    assert f"FAILED {error}" in capfd.readouterr().out


def test_no_process_begins_when_the_time_of_the_stage_is_over(tmp_path: Path) -> None:
    assert not run(tmp_path, stage(tmp_path, "one", "first", "stuck", "last", deadline=4.5))
    found = result(tmp_path, "one")
    assert found.status == "cut"
    assert [row.error for row in found.rows] == [None, "its process ended before it was done"]


def test_stages_for_which_no_time_is_left_say_so(tmp_path: Path) -> None:
    assert not run(tmp_path, stage(tmp_path, "one", "hang"), stage(tmp_path, "two", "row"), limit=1.0)
    assert result(tmp_path, "one").status == "cut"
    assert result(tmp_path, "two").error == "no time was left"


def test_rows_of_another_device_or_commit_are_not_kept(tmp_path: Path) -> None:
    for other in (replace(ORIGIN, device="another"), replace(ORIGIN, commit="def"), replace(ORIGIN, rehearsal=False)):
        Recorder(tmp_path, "one", ORIGIN).row("row", lambda: {"value": 1.0})
        assert set(Recorder(tmp_path, "one", replace(ORIGIN, date="2026-11-23")).rows) == {"row"}
        assert not Recorder(tmp_path, "one", other).rows


def test_what_is_no_number_is_not_written(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "one", ORIGIN)
    recorder.row("row", lambda: {"value": float("nan")})
    assert json.loads(path_of(tmp_path, "one").read_text())["rows"][0]["error"] == "ValueError: value is nan"
    assert results.read(path_of(tmp_path, "one")).rows[0].values == {}
