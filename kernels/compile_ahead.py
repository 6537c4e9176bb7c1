"""Compile the kernels that a piece of work will launch, many at a time, before the work is done. Knows no kernel.

A kernel is compiled when it is first launched, which takes a fifth of a second and more; a model needs dozens. Here the
work is gone through once with tensors that have no memory. Triton keeps what it has compiled on disk, so a second start
finds everything there.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from llmd_kernels import dispatch

# Tensors on it have shapes and dtypes, and no memory.
WITHOUT_MEMORY = "meta"


@contextmanager
def compiling_ahead(*, num_threads: int) -> Iterator[list[str]]:
    """Inside, what launches a kernel compiles it and runs nothing; yields the growing list of their names.

    All is compiled when the block ends; what does not compile will say so when it is launched. Give tensors of the
    device "meta": like large allocations, their addresses count as divisible by 16. Kernels may not be launched
    elsewhere in the process meanwhile.
    """
    # Takes time to import, and is not there on every machine.
    import triton
    from triton.runtime.jit import JITFunction

    launched: list[str] = []
    launch = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        launched.append(kernel.fn.__name__)
        return launch(kernel, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    dispatch.TRITON_DEVICES.add(WITHOUT_MEMORY)
    try:
        with ThreadPoolExecutor(num_threads) as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
            yield launched
    finally:
        dispatch.TRITON_DEVICES.discard(WITHOUT_MEMORY)
        JITFunction.run = launch
