"""`scripts/check-kernels [--all] [NAME…]`: all proofs of all kernels as a table; exits 1 if one fails.

Knows how proofs are shown, not what they say.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from tests.kernels.proof.checks import Outcome, Proof, check_case, check_rows
from tests.kernels.proof.compiler import TARGETS
from tests.kernels.proof.gates import Passed, check_configuration
from tests.kernels.proof.registry import PROOFS

HEADINGS = ("kernel", "proof", "", "result", "seconds")
WIDTHS = (16, 12, 46, 60, 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one row a proof as it ends; 0 if all hold."""
    parser = argparse.ArgumentParser(prog="check-kernels", description="Prove the Triton kernels without a GPU.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="operations; default: all")
    parser.add_argument("--all", action="store_true", help="compile every configuration for every architecture")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - {proof.name for proof in PROOFS}
    if unknown:
        parser.error(f"no proof of {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in PROOFS)}")
    _print_row(HEADINGS)
    failures = sum(
        _check(proof, everything=options.all) for proof in PROOFS if proof.name in options.names or not options.names
    )
    print(f"{failures} failed" if failures else "all hold; nothing here ran on a GPU")
    return 1 if failures else 0


def _check(proof: Proof, *, everything: bool) -> int:
    """How many of its proofs fail."""
    failures = 0
    for case in proof.cases:
        failures += _row(proof, "interpreter", case.name, lambda case=case: _outcome(check_case(proof, case)))
    for rows in proof.rows:
        failures += _row(proof, "invariance", rows.name, lambda rows=rows: check_rows(rows) or "bitwise")
    configurations = (
        proof.configurations if everything else proof.configurations[:: max(1, len(proof.configurations) // 3)]
    )
    for configuration in configurations:
        for arch in configuration.archs or TARGETS:
            failures += _row(
                proof,
                arch,
                configuration.name,
                lambda c=configuration, arch=arch: "; ".join(map(_compiled, check_configuration(c, arch))),
            )
    return failures


def _row(proof: Proof, kind: str, name: str, check: Callable[[], str]) -> int:
    """Run one check and print its row; 1 if it fails."""
    start = time.monotonic()
    try:
        result, failures = check(), 0
    except Exception as error:  # whatever it is, the other proofs go on
        result, failures = f"FAILED {type(error).__name__}: {' '.join(str(error).split())}", 1
    _print_row((proof.name, kind, name, result, f"{time.monotonic() - start:.1f}"))
    return failures


def _print_row(cells: Sequence[str]) -> None:
    print("  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip(), flush=True)


def _outcome(outcome: Outcome) -> str:
    traffic = "" if outcome.traffic is None else f", {outcome.traffic:.3f} of the bytes in cost.py"
    return f"error {outcome.error:.1e}{traffic}"


def _compiled(passed: Passed) -> str:
    code = passed.listing
    matrix = "".join(f", {count} {name}" for name, count in sorted(code.matrix.items()))
    shared = f", {passed.compiled.shared_bytes} B shared" if passed.compiled.shared_bytes else ""
    return f"{code.registers} registers{shared}, {code.vector_share:.0%} wide loads{matrix}"


if __name__ == "__main__":
    sys.exit(main())
