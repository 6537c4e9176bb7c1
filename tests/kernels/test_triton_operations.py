"""Every Triton kernel in the interpreter: numbers, whole outputs, bytes moved, bits without neighbours."""

import pytest

from tests.kernels.proof.checks import Case, Proof, Rows, check_case, check_rows
from tests.kernels.proof.registry import PROOFS

CASES = [pytest.param(proof, case, id=f"{proof.name}: {case.name}") for proof in PROOFS for case in proof.cases]
ROWS = [pytest.param(rows, id=f"{proof.name}: {rows.name}") for proof in PROOFS for rows in proof.rows]


@pytest.mark.parametrize(("proof", "case"), CASES)
def test_equals_the_reference(proof: Proof, case: Case) -> None:
    check_case(proof, case)


@pytest.mark.parametrize("rows", ROWS)
def test_bits_of_a_row_do_not_depend_on_the_others(rows: Rows) -> None:
    check_rows(rows)
