"""Kernels compiled by many processes at a time, into Triton's cache, before one process launches them."""

import functools
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.pool import Pool

from bench.gpu.results import Values
from tests.kernels.proof.checks import Proof
from tests.kernels.proof.compiler import TARGETS, compiled_for
from tests.kernels.proof.registry import PROOFS

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


def shipped(patterns: Mapping[str, str], arch: str) -> list[Work]:
    """The configurations of proofs, by name, whose own names match a pattern, and which ship for this architecture."""
    return [
        functools.partial(run_configuration, name, index)
        for name, pattern in patterns.items()
        for index, configuration in enumerate(proof_of(name).configurations)
        if re.fullmatch(pattern, configuration.name) and (arch in configuration.archs or not configuration.archs)
    ]


def proof_of(name: str) -> Proof:
    return next(proof for proof in PROOFS if proof.name == name)


def run_configuration(name: str, index: int) -> None:
    proof_of(name).configurations[index].call()


def _compile(task: tuple[str, Work]) -> str:
    arch, work = task
    try:
        with compiled_for(arch):
            work()
    except Exception as error:  # one that does not compile must not keep the others from it
        return f"{type(error).__name__}: {error}"
    return ""
