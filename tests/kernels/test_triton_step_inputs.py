"""Step preparation in Triton: whole outputs, bytes moved, faults that are caught. Numbers: the operation's proof."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmd_kernels.step_inputs import StepInputs, cost, triton_ops
from tests.kernels.proof.checks import Case, Proof, check_case
from tests.kernels.proof.faults import with_fault
from tests.kernels.proof.interpreter import interpreted
from tests.kernels.proof.memory import OutOfBounds, Race
from tests.kernels.proof.operations.step_inputs import PROOF, arguments, prepare

OUTPUTS = list(StepInputs.__dataclass_fields__)


def test_all_of_the_inputs_are_written_whatever_was_there() -> None:
    for case in PROOF.cases:
        with interpreted(shuffle=1) as launches:
            PROOF.operation(**case.arguments)
        (launched,) = (launch for launch in launches if launch.kernel == "step_inputs_kernel")
        assert [launched.unwritten(name) for name in OUTPUTS] == [0] * len(OUTPUTS), case.name


def test_little_is_moved() -> None:
    """The packed rows are read again and again, from a cache; everything else once."""
    num_rows, max_rows = 120, 128
    rows = [(place, 2 * place, 1, 0, 1) for place in range(num_rows)]
    given = arguments(
        rows, [], max_rows=max_rows, max_tokens=max_rows, max_logits=max_rows, num_places=max_rows, max_len=256
    )
    with interpreted() as launches:
        PROOF.operation(**given)
    (launched,) = (launch for launch in launches if launch.kernel == "step_inputs_kernel")
    regions = launched.memory.regions
    moved = sum(
        region.stored + (region.distinct_loaded if region.name == "step" else region.loaded) for region in regions
    )
    least = cost.bytes_moved(num_rows, max_rows=max_rows, max_tokens=max_rows, max_logits=max_rows)
    assert moved == pytest.approx(least, rel=0.05)


FAULTS = [
    ("one row too far", "rows + FIRST_TOKEN * max_rows, max_rows, token)", "rows + FIRST_TOKEN * max_rows, max_rows, token + 1)"),  # noqa: E501
    ("padding not marked", "tl.where(is_used, block * PAGE + position % PAGE, -1)", "block * PAGE + position % PAGE"),
    ("padding reads the tables", "token_table + place * token_stride + position, mask=is_used", "token_table + place * token_stride + position, mask=exists"),  # noqa: E501
    ("place forgotten", "block_tables + place * block_stride + position", "block_tables + row * block_stride + position"),  # noqa: E501
    ("start of the wrong row", "rows + START * max_rows + row, mask=is_used", "rows + START * max_rows + 0 * row, mask=is_used"),  # noqa: E501
    ("last start forgotten", "mask=row <= max_rows)", "mask=row < max_rows)"),
    ("context without this step", "mask=exists, other=0) + num_tokens)", "mask=exists, other=0) + 0 * num_tokens)"),
    ("prompt logits not skipped", "logit += tl.load(rows + NUM_PROMPT_LOGITS", "logit += 0 * tl.load(rows + NUM_PROMPT_LOGITS"),  # noqa: E501
    ("old samples left", "row >= tl.load(step + NUM_SAMPLES)", "row > tl.load(step + NUM_SAMPLES)"),
    ("new samples cleared", "row >= tl.load(step + NUM_SAMPLES)", "row >= tl.load(step + NUM_SAMPLES) - 1"),
    ("last logit is of the first token", "tl.where(is_prompt, within, last)", "tl.where(is_prompt, within, 0)"),
    ("drawn token one place early", "token_stride + position, token_id", "token_stride + position - 1, token_id"),
    ("drawn for nobody", "(place >= 0) & (position", "(place >= -1) & (position"),
    ("drawn beyond the table", "& (position < max_len)", "& (position <= max_len)"),
    ("last segment forgotten", "tl.load(step + NUM_SEGMENTS), tl", "tl.load(step + NUM_SEGMENTS) - 1, tl"),
    ("segment not masked", "mask = columns < tl.load(segment + 3)", "mask = columns < tl.load(segment + 3) + 1"),
    ("tables exchanged", "tl.load(segment) == TOKEN_IDS_TABLE", "tl.load(segment) != TOKEN_IDS_TABLE"),
]  # fmt: skip


@pytest.mark.parametrize(("right", "wrong"), [pytest.param(*fault[1:], id=fault[0]) for fault in FAULTS])
def test_a_planted_fault_is_found(right: str, wrong: str, tmp_path: Path) -> None:
    faulty = replace(PROOF, operation=prepare(with_fault(triton_ops, right, wrong, tmp_path)))
    assert any(not _passes(faulty, case) for case in PROOF.cases)


def _passes(proof: Proof, case: Case) -> bool:
    try:
        check_case(proof, case)
    except (AssertionError, OutOfBounds, Race):
        return False
    return True


def test_programs_share_the_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "SEGMENT_PROGRAMS", 2)
    check_case(PROOF, PROOF.cases[-1])
