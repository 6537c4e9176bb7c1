"""Compile the kernels that a piece of work will launch, many at a time, before the work is done. Knows no kernel.

A kernel is compiled when it is first launched, which takes a fifth of a second and more; a model needs dozens. With
Triton 3.6 so is its launcher, a little C for each signature. Here the work is gone through once with tensors that have
no memory. Triton keeps what it has compiled on disk, so a second start finds everything there.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmd_kernels import dispatch
from llmd_kernels.dispatch import WITHOUT_MEMORY

# What Triton tells addresses apart by, in bytes.
_ALIGNMENT = 16


@dataclass(slots=True)
class Compilation:
    """How far it is. Any thread may look, and cancel it."""

    threads: ThreadPoolExecutor
    launched: list[str] = field(default_factory=list)  # names of kernels, once a launch
    kernels: list[Future[Any]] = field(default_factory=list)  # each once, to be compiled or found on disk

    @property
    def num_done(self) -> int:
        return sum(kernel.done() for kernel in self.kernels)

    def cancel(self) -> None:
        """Compile nothing that has not begun; what is launched from now on raises RuntimeError. Once."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for kernel in self.kernels:
            if kernel.cancelled():
                # nobody else tells those who wait for it
                kernel.set_running_or_notify_cancel()


@contextmanager
def compiling_ahead(*, num_threads: int) -> Iterator[Compilation]:
    """Inside, what this thread launches is compiled by others and not run; the rest of the process launches as ever.

    All is compiled when the block ends; what does not compile will say so when it is launched. Give tensors of the
    device "meta": like large allocations, their addresses count as divisible by 16.
    """
    # Takes time to import, and is not there on every machine.
    import triton
    from triton.runtime.jit import JITFunction

    seen: set[Hashable] = set()
    here = threading.get_ident()
    launch = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        if threading.get_ident() != here:
            return launch(kernel, *args, grid=grid, warmup=warmup, **options)
        compilation.launched.append(kernel.fn.__name__)
        # Until the end Triton would make up its mind anew each time, which takes ten times as long.
        known = (id(kernel), *map(_kind_of, args), *((name, _kind_of(value)) for name, value in options.items()))
        if known in seen:
            return None
        seen.add(known)
        return launch(kernel, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    dispatch.TRITON_DEVICES.add(WITHOUT_MEMORY)
    try:
        with (
            ThreadPoolExecutor(num_threads, thread_name_prefix="compile") as threads,
            triton.AsyncCompileMode(_WithLaunchers(threads), ignore_errors=True) as mode,
        ):
            compilation = Compilation(threads, kernels=mode.raw_futures)
            yield compilation
    finally:
        dispatch.TRITON_DEVICES.discard(WITHOUT_MEMORY)
        JITFunction.run = launch


@dataclass(frozen=True, slots=True)
class _WithLaunchers:
    """What Triton gives its compilations to."""

    threads: ThreadPoolExecutor

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:
        return self.threads.submit(_with_launcher, compile_kernel)


def _with_launcher(compile_kernel: Callable[[], Any]) -> Any:
    """Triton makes a launcher when a kernel is first launched; of the next one it finds what it compiled for this."""
    from triton.runtime import driver

    kernel = compile_kernel()
    # a driver that only compiles has none
    if hasattr(driver.active, "launcher_cls"):
        driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel


def _kind_of(argument: Any) -> Hashable:
    """All that a kernel can depend on; of numbers more than that."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNMENT
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    return type(argument), argument
