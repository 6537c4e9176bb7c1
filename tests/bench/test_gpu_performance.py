"""docs/performance.md says what has been measured, and that nothing has been where nothing is."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from bench.gpu import results
from bench.gpu.limits import Limits
from bench.gpu.performance import DOCUMENT, NOT_MEASURED, RESULTS, filled, newest
from bench.gpu.results import Origin, Row, StageResult, Value, path_of

TABLES = "".join(
    f"{name}:\n<!-- table: {name} -->\nold\n<!-- end -->\n"
    for name in ("origin", "goals", "limits", "device", "correctness", "kernels", "steps", "server", "sweep")
)


def stage(name: str, rows: Mapping[str, Mapping[str, Value]], *, date: str = "2026-12-01") -> StageResult:
    origin = Origin(date, "NVIDIA H100 80GB HBM3", "abc", rehearsal=False)
    return StageResult(name, "done", origin, 1.0, None, [Row(row, dict(values), 0.1) for row, values in rows.items()])


def line(document: str, start: str) -> str:
    return next(line for line in document.splitlines() if line.startswith(start))


def test_the_document_is_what_the_results_make_of_it() -> None:
    document = DOCUMENT.read_text()
    assert filled(document, newest(RESULTS)) == document, "run scripts/gpu-check --report"


def test_without_results_every_table_says_that_nothing_is_measured() -> None:
    document = filled(TABLES, {})
    assert "old" not in document
    assert "No GPU has run llmd yet" in document
    for name in ("device", "correctness", "kernels", "steps", "server", "sweep"):
        assert f"<!-- table: {name} -->\n{NOT_MEASURED}\n<!-- end -->" in document
    goals = document.partition("<!-- table: goals -->")[2].partition("<!-- end -->")[0].splitlines()[3:]
    assert goals
    assert all(goal.endswith(f"| {NOT_MEASURED} |") for goal in goals)


def test_measured_figures_stand_beside_their_goals() -> None:
    found = {
        "server": stage(
            "server",
            {
                "load, 1 at once": {"output tok/s": 171.234, "engine CPU us a step": 71.0},
                "load, 256 at once": {"output tok/s": 6300.7, "engine CPU us a step": 149.0},
                "start, warm compile cache": {"first token s": 5.5},
            },
        ),
        "kernels": stage(
            "kernels",
            {
                "linear qkv, 64 tokens": {"us": 10.0, "of limit": 0.91},
                "linear down, 1 tokens": {"us": 10.0, "of limit": 0.85, "cuBLAS us": 9.0},
                "linear o, 4096 tokens": {"us": 10.0, "of limit": 0.5, "cuBLAS us": 9.5},
                "paged_attention, decode 256 × 1024": {"us": 350.0, "of limit": 0.94},
                "sample_on_device top-k and top-p, 256 rows": {"us": 121.0},
                **{
                    f"linear {name}, {num_tokens} tokens": {"us": 11.0, "of limit": 0.91, "cuBLAS us": 10.0}
                    for name in ("qkv", "o", "gate_up", "down")
                    for num_tokens in (64, 256)
                },
            },
        ),
        "steps": stage(
            "steps",
            {
                f"decode step, {num_seqs} at once": {"us": us, "idle us": idle, "host us": 400.0}
                for num_seqs, us, idle in ((1, 5400.0, 15.0), (32, 7000.0, 17.0), (256, 17000.0, 21.0))
            },
        ),
    }
    document = filled(TABLES, found)
    assert line(document, "| output tokens/s, 1 at once, 1,024").endswith("| 171 tok/s |")
    assert line(document, "| output tokens/s, 256 at once, 1,024").endswith("| 6,301 tok/s |")
    assert line(document, "| output tokens/s, 32 at once").endswith(f"| {NOT_MEASURED} |")
    assert line(document, "| engine's CPU time").endswith("| 71 / 149 µs |")
    assert line(document, "| command to first token").endswith("| 5.5 s |")
    assert line(document, "| matrix products, up to 64").endswith("| 85% (linear down, 1 tokens) |")
    assert line(document, "| matrix products, from 1,024").endswith("| 95% (linear o, 4096 tokens) |")
    assert line(document, "| decode attention, at least").endswith("| 94% (paged_attention, decode 256 × 1024) |")
    assert line(document, "| GPU idle").endswith("| 15 / 17 / 21 µs |")
    assert line(document, "| worker's time").endswith("| 400 / 400 / 400 µs |")
    assert line(document, "| decode steps as launched").endswith(
        "| 5.05 / 6.43 / 16.46 ms | 5,400 / 7,000 / 17,000 µs |"
    )
    assert line(document, "| cost of batch invariance").endswith("| 10% / 10% |")
    assert line(document, "| sampling, top-k").endswith("| 121 µs |")
    assert "| server | 2026-12-01 | NVIDIA H100 80GB HBM3 | abc | done, 3 rows |" in document


def test_the_newest_result_of_each_stage_counts_and_no_rehearsal(tmp_path: Path) -> None:
    def write(folder: str, result: StageResult) -> None:
        results.write(path_of(tmp_path / folder, result.stage), result)

    write("2026-12-01-h100", stage("device", {"old": {}}))
    write("2026-12-01-h100", stage("server", {"only": {}}))
    write("2026-12-05-h100", stage("device", {"new": {}}, date="2026-12-05"))
    rehearsal = Origin("2026-12-09", "rehearsal on a CPU", "abc", rehearsal=True)
    write("2026-12-09-rehearsal", StageResult("device", "done", rehearsal))
    found = newest(tmp_path)
    assert [row.name for row in found["device"].rows] == ["new"]
    assert [row.name for row in found["server"].rows] == ["only"]


def test_an_error_on_the_device_is_shown() -> None:
    failed = stage("correctness", {"rms_norm, cases": {"cases": 21}})
    failed.rows.append(Row("linear, rows", {}, 0.1, "AssertionError: 3 numbers differ"))
    document = filled(TABLES, {"correctness": failed})
    assert "| linear, rows | AssertionError: 3 numbers differ |" in document
    assert "done, 2 rows, 1 failed" in document


def test_a_table_that_nobody_makes_is_an_error() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        filled("<!-- table: nonsense -->\n<!-- end -->", {})


def test_limits_of_llama_8b_on_an_h100() -> None:
    """By hand: 15.01 GB of weights and 134 MB a context at 3.0 TB/s; 2 · 6.98e9 · 1,024 operations and attention."""
    limits = Limits()
    assert limits.decode_step(1, 1024) == pytest.approx((15.009e9 + 1024 * 131072) / 3.0e12, rel=1e-3)
    assert limits.decode_step(256, 1024) == pytest.approx((15.009e9 + 256 * 1024 * 131072) / 3.0e12, rel=1e-3)
    attention = 4 * 32 * 32 * 128 * 1024 * 1024 / 2
    assert limits.prefill(1024) == pytest.approx((2 * 6.979e9 * 1024 + attention) / 800e12, rel=2e-3)
    assert limits.prefill(1) == pytest.approx(15.009e9 / 3.0e12, rel=1e-3)
