"""One row of the table of proofs, in any process: which there are, and what each of them shows."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tests.kernels.proof.checks import Outcome, Proof, check_case, check_rows
from tests.kernels.proof.compiler import TARGETS
from tests.kernels.proof.gates import Passed, check_configuration
from tests.kernels.proof.registry import PROOFS

# Cells, and whether the check failed.
Row = tuple[Sequence[str], bool]

BY_NAME = {proof.name: proof for proof in PROOFS}


@dataclass(frozen=True, slots=True)
class Check:
    """By names, because a proof itself cannot be sent to another process."""

    proof: str
    kind: str  # "interpreter", "invariance" or an architecture
    place: int  # in the proof's cases, rows or configurations


def checks_of(name: str, *, everything: bool) -> Iterator[Check]:
    """All that is proven of an operation; of its configurations a few unless `everything`."""
    proof = BY_NAME[name]
    yield from (Check(name, "interpreter", place) for place in range(len(proof.cases)))
    yield from (Check(name, "invariance", place) for place in range(len(proof.rows)))
    num_configurations = len(proof.configurations)
    for place in range(0, num_configurations, 1 if everything else max(1, num_configurations // 3)):
        for arch in proof.configurations[place].archs or TARGETS:
            yield Check(name, arch, place)


def one_thread() -> None:
    """Processes that share cores must not each take them all."""
    torch.set_num_threads(1)


def row_of(check: Check) -> Row:
    """What the table says of this check."""
    start = time.monotonic()
    proof, failed = BY_NAME[check.proof], False
    proven = {"interpreter": proof.cases, "invariance": proof.rows}.get(check.kind, proof.configurations)
    try:
        result = _result(proof, check)
    except Exception as error:  # whatever it is, the other proofs go on
        result, failed = f"FAILED {type(error).__name__}: {' '.join(str(error).split())}", True
    return (proof.name, check.kind, proven[check.place].name, result, f"{time.monotonic() - start:.1f}"), failed


def _result(proof: Proof, check: Check) -> str:
    match check.kind:
        case "interpreter":
            return _outcome(check_case(proof, proof.cases[check.place]))
        case "invariance":
            check_rows(proof.rows[check.place])
            return "bitwise"
        case arch:
            return "; ".join(map(_compiled, check_configuration(proof.configurations[check.place], arch)))


def _outcome(outcome: Outcome) -> str:
    traffic = "" if outcome.traffic is None else f", {outcome.traffic:.3f} of the bytes in cost.py"
    return f"error {outcome.error:.1e}{traffic}"


def _compiled(passed: Passed) -> str:
    code = passed.listing
    matrix = "".join(f", {count} {name}" for name, count in sorted(code.matrix.items()))
    shared = f", {passed.compiled.shared_bytes} B shared" if passed.compiled.shared_bytes else ""
    return f"{code.registers} registers{shared}, {code.vector_share:.0%} wide loads{matrix}"
