"""`scripts/check-kernels`: a row for each proof, and an exit status that tells whether all hold."""

from dataclasses import replace

import pytest

from tests.kernels.proof import __main__ as check_kernels
from tests.kernels.proof import table
from tests.kernels.proof.checks import Proof
from tests.kernels.proof.registry import PROOFS


def check_only(proof: Proof, monkeypatch: pytest.MonkeyPatch) -> int:
    """Two cases of it and no compiling, in this process."""
    by_name = {proof.name: replace(proof, cases=proof.cases[1:3], configurations=[])}
    for module in (table, check_kernels):
        monkeypatch.setattr(module, "BY_NAME", by_name)
    return check_kernels.main(["--jobs", "1"])


def test_prints_a_row_for_each_proof(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_only(PROOFS[0], monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 + len(PROOFS[0].rows) + 1
    assert lines[-1] == "all hold; nothing here ran on a GPU"


def test_a_proof_that_fails_is_shown_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = replace(PROOFS[0], reference=lambda x, weight, eps, weight_offset: x + 1)
    assert check_only(wrong, monkeypatch) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("FAILED AssertionError" in line for line in lines) == 2
    assert lines[-1] == "2 failed"


def test_an_unknown_name_is_refused_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_kernels.main(["no_such_kernel"])
    assert "no proof of no_such_kernel; there are rms_norm, add_rms_norm" in capsys.readouterr().err
