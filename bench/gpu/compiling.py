"""Kernels compiled by many processes at a time, into Triton's cache, before one process launches them."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import Pool

from tests.kernels.proof.compiler import TARGETS, compiled_for

Work = Callable[[], object]


@contextmanager
def compile_pool(num_processes: int) -> Iterator[Pool]:
    """Processes that have all modules already: they are forked, so open it before CUDA is touched."""
    with multiprocessing.get_context("fork").Pool(num_processes) as pool:
        yield pool


def compile_all(pool: Pool, arch: str, works: Sequence[Work]) -> list[str]:
    """Compile for `arch` what each work would launch; the errors. Works can be pickled.

    Nothing is done for an architecture that the proofs do not know: kernels are then compiled as they are launched.
    """
    if arch not in TARGETS:
        return []
    return [error for error in pool.imap_unordered(_compile, [(arch, work) for work in works], chunksize=1) if error]


def _compile(task: tuple[str, Work]) -> str:
    arch, work = task
    try:
        with compiled_for(arch):
            work()
    except Exception as error:  # one that does not compile must not keep the others from it
        return f"{type(error).__name__}: {error}"
    return ""
