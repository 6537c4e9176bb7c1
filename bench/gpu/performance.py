"""`scripts/gpu-check --report`: the tables of docs/performance.md, from the newest results. Its prose stays."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.gpu import results
from bench.gpu.goals import GOALS, LIMITS, Measured, shown
from bench.gpu.packages import ROOT
from bench.gpu.results import StageResult, Value, Values

DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "bench" / "results"
STAGES = ("device", "correctness", "kernels", "steps", "server", "sweep")
NOT_MEASURED = "not measured yet"
# What a table's place in the document looks like.
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def report() -> None:
    DOCUMENT.write_text(filled(DOCUMENT.read_text(), newest(RESULTS)))


def newest(folder: Path) -> dict[str, StageResult]:
    """The last result of each stage: folders are named by date. Rehearsals say nothing."""
    found = {}
    for path in sorted(folder.glob("*/*.json")):
        if path.stem in STAGES:
            result = results.read(path)
            if not result.origin.rehearsal:
                found[result.stage] = result
    return found


def filled(document: str, found: Mapping[str, StageResult]) -> str:
    """The document with each table between its marks made anew. Raises KeyError for a name that is none of a table."""
    measured = {
        stage: {row.name: row.values for row in result.rows if row.error is None} for stage, result in found.items()
    }

    def table(match: re.Match[str]) -> str:
        lines = {
            "origin": lambda: _origin(found),
            "goals": lambda: _goals(measured),
            "limits": _limits,
            "device": lambda: _rows(measured, "device"),
            "correctness": lambda: _correctness(found),
            "kernels": lambda: _kernels(measured),
            "steps": lambda: _rows(measured, "steps"),
            "sweep": lambda: _sweep(measured),
            "server": lambda: _rows(measured, "server"),
        }[match[2]]()
        return match[1] + "".join(f"{line}\n" for line in lines) + match[3]

    return _TABLE.sub(table, document)


def _origin(found: Mapping[str, StageResult]) -> Iterator[str]:
    if not found:
        yield "No GPU has run llmd yet: **no figure of a GPU below is measured**, and each place for one says so."
        return
    yield from _table(
        ("stage", "date", "device", "commit", "result"),
        [
            (stage, result.origin.date, result.origin.device, result.origin.commit, _how(result))
            for stage, result in found.items()
        ],
    )


def _how(result: StageResult) -> str:
    failed = sum(row.error is not None for row in result.rows)
    return f"{result.status}, {len(result.rows)} rows" + (f", {failed} failed" if failed else "")


def _goals(measured: Measured) -> Iterator[str]:
    yield from _table(
        ("", "best known", "goal", "limit", "measured"),
        [(goal.name, goal.known, goal.goal, goal.limit, goal.measured(measured) or NOT_MEASURED) for goal in GOALS],
    )


def _limits() -> Iterator[str]:
    batches = (1, 32, 64, 128, 256)
    rows = []
    for context in (1024, 8192):
        steps = [LIMITS.decode_step(num_seqs, context) for num_seqs in batches]
        rows.append((f"decode, context {context:,}: ms a step", *(f"{1e3 * step:.2f}" for step in steps)))
        speeds = (f"{num_seqs / step:,.0f}" for num_seqs, step in zip(batches, steps, strict=True))
        rows.append((f"decode, context {context:,}: tokens/s", *speeds))
    loops = (f"{LIMITS.closed_loop(num_seqs, 1024, 256):,.0f}" for num_seqs in batches)
    rows.append(("1,024 in / 256 out: tokens/s", *loops))
    yield from _table(("sequences at once", *map(str, batches)), rows)
    yield ""
    prompts = (128, 512, 1024, 2048, 8192)
    times = (f"{1e3 * LIMITS.prefill(num_tokens):.1f}" for num_tokens in prompts)
    yield from _table(("prompt, tokens", *(f"{number:,}" for number in prompts)), [("first token: ms", *times)])


def _correctness(found: Mapping[str, StageResult]) -> Iterator[str]:
    if "correctness" not in found:
        yield NOT_MEASURED
        return
    rows = [(row.name, row.error or _cells(row.values)) for row in found["correctness"].rows]
    yield from _table(("on the device", "result"), rows)


def _kernels(measured: Measured) -> Iterator[str]:
    rows = [(name, values) for name, values in measured.get("kernels", {}).items() if "us" in values]
    if not rows:
        yield NOT_MEASURED
        return
    peers = sorted({name for _, values in rows for name in values if name.endswith(" us") and name != "limit us"})
    yield from _table(
        ("kernel", "µs", "limit µs", "of limit", *(peer.replace(" us", ", µs") for peer in peers)),
        [(name, *(_cell(values.get(key)) for key in ("us", "limit us", "of limit", *peers))) for name, values in rows],
    )


def _sweep(measured: Measured) -> Iterator[str]:
    """The fastest tiling of each group beside the one that ships, which was measured first."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for name, values in measured.get("sweep", {}).items():
        if values.get("us"):
            group, _, tile = name.rpartition(", ")
            groups.setdefault(group, []).append((tile, float(values["us"])))
    if not groups:
        yield NOT_MEASURED
        return
    rows = []
    for group, tiles in groups.items():
        (shipped, shipped_us), (best, best_us) = tiles[0], min(tiles, key=lambda tile: tile[1])
        rows.append((group, shipped, shown(shipped_us), best, shown(best_us)))
    yield from _table(("", "ships", "µs", "fastest", "µs"), rows)


def _rows(measured: Measured, stage: str) -> Iterator[str]:
    rows = measured.get(stage, {})
    if not rows:
        yield NOT_MEASURED
        return
    yield from _table(("", "measured"), [(name, _cells(values)) for name, values in rows.items()])


def _cells(values: Values) -> str:
    return ", ".join(f"{name} {_cell(value)}" for name, value in values.items() if value is not None)


def _cell(value: Value) -> str:
    if value is None:
        return ""
    return results.shown(value)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '∣') for cell in row)} |"
