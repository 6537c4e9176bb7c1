"""Kernels compiled by many processes at a time, into Triton's cache, before one process launches them."""

import functools
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.pool import Pool
from typing import NamedTuple

import torch
from triton.backends.nvidia import driver

from bench.gpu.machine import Machine
from bench.gpu.results import Values
from tests.kernels.proof.checks import Proof
from tests.kernels.proof.compiler import TARGETS, compiled_for
from tests.kernels.proof.registry import PROOFS

Work = Callable[[], object]

# Seconds without any result, after which a process is taken for dead: what it had then never comes.
_PATIENCE = 30.0


@contextmanager
def compile_pool(num_processes: int) -> Iterator[Pool]:
    """Processes that have all modules already: they are forked, so open it before CUDA is touched."""
    # torch's threads are not there after a fork, and an operation that counts on them waits for ever
    with multiprocessing.get_context("fork").Pool(num_processes, torch.set_num_threads, (1,)) as pool:
        yield pool


def compile_all(pool: Pool, machine: Machine, works: Sequence[Work]) -> Values:
    """Compile for the machine what each work would launch; how that went. Works can be pickled.

    What does not compile is only counted: it has its error again when it is launched. Nothing is done for an
    architecture that the proofs do not know: kernels are then compiled as they are launched.
    """
    if machine.arch not in TARGETS:
        return {"launches": 0, "note": f"{machine.arch} is compiled for as kernels are launched"}
    started = time.perf_counter()
    tasks = [_Task(machine.arch, work, is_here=machine.device.type == "cuda") for work in works]
    results = pool.imap_unordered(_compile, tasks, chunksize=1)
    errors = []
    for number in range(len(works)):
        try:
            errors.append(results.next(_PATIENCE))
        except multiprocessing.TimeoutError:
            errors.append(f"{len(works) - number} of {len(works)} were never heard of again")
            break
    errors = [error for error in errors if error]
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


class _Task(NamedTuple):
    arch: str
    work: Work
    is_here: bool  # a GPU that will launch what is compiled


def _compile(task: _Task) -> str:
    error = ""
    with compiled_for(task.arch) as compiled:
        try:
            task.work()
        except AssertionError:
            pass  # of results, which a launch that only compiles does not have
        except Exception as failure:  # one that does not compile must not keep the others from it
            error = f"{type(failure).__name__}: {failure}"
    # Triton 3.6 compiles a little C for each signature, one after the other, as kernels are first launched.
    if task.is_here and hasattr(driver, "make_launcher"):
        for kernel in compiled:
            driver.CudaLauncher(kernel.binary.src, kernel.binary.metadata)
    return error
