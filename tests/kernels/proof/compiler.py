"""Compile Triton kernels for GPUs that are not here, exactly as a launch on them would.

Inside of `compiled_for(arch)` launching a kernel compiles it, with the specialization that Triton itself derives from
the arguments, and runs nothing. Tensors need no memory (device "meta"). Triton's own cache makes a second time quick.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What the name of a matrix instruction for 16-bit numbers begins with.
MATRIX = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}
# Of those that sum one number of K at a time, whatever the tile: contract C3 wants no other.
MATRIX_OF_ONE_DEPTH = {**MATRIX, "gfx942": "v_mfma_f32_16x16x"}


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture: `code` is a cubin for NVIDIA's, text for AMD's."""

    kernel: str
    arch: str
    code: bytes
    num_warps: int
    shared_bytes: int
    binary: Any  # as Triton has it

    @property
    def single_loads(self) -> frozenset[str]:
        """The lines of the source, "file:line", that load single numbers and no tensors."""
        return single_loads(self.binary.asm["ttir"])


@contextmanager
def compiled_for(arch: str) -> Iterator[list[Compiled]]:
    """Yields the list of kernels that were launched inside, compiled; it grows."""
    compiled: list[Compiled] = []
    real_run = JITFunction.run

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        binary = real_run(kernel, *args, grid=grid, warmup=True, **options)
        code = binary.asm["cubin"] if arch.startswith("sm_") else binary.asm["amdgcn"].encode()
        metadata = binary.metadata
        compiled.append(Compiled(kernel.fn.__name__, arch, code, metadata.num_warps, metadata.shared, binary))

    JITFunction.run = run  # type: ignore[method-assign]
    try:
        with absent_gpu(arch):
            yield compiled
    finally:
        JITFunction.run = real_run  # type: ignore[method-assign]


def single_loads(ttir: str) -> frozenset[str]:
    """The lines of the source that load single numbers and no tensors, as Triton's intermediate language tells."""
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))

    def line_of(place: str) -> str:
        """Of what is called at a place, or has a name there, the line comes first."""
        file, alias = re.search(r'"([^"]+)":(\d+):\d+', place), re.search(r"#loc\d*", place)
        if file:
            return f"{file[1]}:{file[2]}"
        return line_of(places[alias[0]]) if alias else ""

    # An atomic that adds nothing is compiled to a load.
    loads = re.findall(r"= tt\.(?:\w*load|atomic_\w+) .* : (.*) loc\((.*)\)$", ttir, re.MULTILINE)
    tensors, singles = (
        {line_of(place) for types, place in loads if ("tensor<" in types) == is_tensor} for is_tensor in (True, False)
    )
    return frozenset(singles - tensors - {""})


@contextmanager
def absent_gpu(arch: str) -> Iterator[None]:
    """Inside, Triton finds a driver for a GPU of this architecture, which can compile and not launch."""
    real_driver = driver._active
    driver.set_active(_AbsentGpu(arch))
    try:
        yield
    finally:
        driver._active = real_driver


class _AbsentGpu:
    """What Triton asks a driver before it compiles."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0
