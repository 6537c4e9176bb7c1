"""Kernels compiled by many processes at a time, into Triton's cache, before one process launches them."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import Pool

from bench.gpu.results import Values
from tests.kernels.proof.compiler import TARGETS, compiled_for

Work = Callable[[], object]


@contextmanager
def compile_pool(num_processes: int) -> Iterator[Pool]:
    """Processes that have all modules already: they are forked, so open it before CUDA is touched."""
    with multiprocessing.get_context("fork").Pool(num_processes) as pool:
        yield pool


def compile_all(pool: Pool, arch: str, works: Sequence[Work]) -> Values:
    """Compile for `arch` what each work would launch; how that went. Works can be pickled.

    What does not compile is only counted: it has its error again when it is launched. Nothing is done for an
    architecture that the proofs do not know: kernels are then compiled as they are launched.
    """
    if arch not in TARGETS:
        return {"launches": 0, "note": f"{arch} is compiled for as kernels are launched"}
    started = time.perf_counter()
    tasks = [(arch, work) for work in works]
    errors = [error for error in pool.imap_unordered(_compile, tasks, chunksize=1) if error]
    return {
        "launches": len(works),
        "s": time.perf_counter() - started,
        "errors": len(errors),
        "first error": errors[0] if errors else None,
    }


def _compile(task: tuple[str, Work]) -> str:
    arch, work = task
    try:
        with compiled_for(arch):
            work()
    except Exception as error:  # one that does not compile must not keep the others from it
        return f"{type(error).__name__}: {error}"
    return ""
