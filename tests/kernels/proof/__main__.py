"""`scripts/check-kernels [--all] [--jobs N] [NAME…]`: all proofs of all kernels as a table; exits 1 if one fails.

Knows how proofs are shown, not what they say.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence

from tests.kernels.proof.table import BY_NAME, Check, Row, checks_of, one_thread, row_of

HEADINGS = ("kernel", "proof", "", "result", "seconds")
WIDTHS = (16, 12, 46, 60, 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one row a proof, in order, as they end; 0 if all hold."""
    parser = argparse.ArgumentParser(prog="check-kernels", description="Prove the Triton kernels without a GPU.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="operations; default: all")
    parser.add_argument("--all", action="store_true", help="compile every configuration for every architecture")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes; default: %(default)s")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(BY_NAME)
    if unknown:
        parser.error(f"no proof of {', '.join(sorted(unknown))}; there are {', '.join(BY_NAME)}")
    names = [name for name in BY_NAME if name in options.names or not options.names]
    checks = [check for name in names for check in checks_of(name, everything=options.all)]
    failures = 0
    _print_row(HEADINGS)
    for cells, failed in _rows(checks, options.jobs):
        _print_row(cells)
        failures += failed
    print(f"{failures} failed" if failures else "all hold; nothing here ran on a GPU")
    return 1 if failures else 0


def _rows(checks: Sequence[Check], num_jobs: int) -> Iterator[Row]:
    if num_jobs == 1:
        yield from map(row_of, checks)
        return
    # What is forked from a process whose threads compute can wait for them forever.
    with multiprocessing.get_context("spawn").Pool(num_jobs, one_thread) as pool:
        yield from pool.imap(row_of, checks)


def _print_row(cells: Sequence[str]) -> None:
    print("  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
