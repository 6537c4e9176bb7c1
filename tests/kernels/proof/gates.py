"""What machine code must be like before a configuration ships."""

from dataclasses import dataclass

from tests.kernels.proof.binary import BLOCK_LOAD_BITS, Listing, listing
from tests.kernels.proof.checks import Configuration
from tests.kernels.proof.compiler import Compiled, compiled_for

# Shared memory that one program can have, bytes (CUDA programming guide, table of technical specifications; CDNA3 ISA).
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}


@dataclass(frozen=True)
class Passed:
    """A compiled kernel and its listing, for the table."""

    compiled: Compiled
    listing: Listing


def check_configuration(configuration: Configuration, arch: str) -> list[Passed]:
    """Compile each kernel that the configuration launches; raises AssertionError for what must not ship."""
    with compiled_for(arch) as kernels:
        configuration.call()
    assert kernels, f"{configuration.name} launches nothing"
    passed = [Passed(compiled, listing(compiled)) for compiled in kernels]
    for kernel in passed:
        fault = _fault(configuration, kernel.compiled, kernel.listing)
        assert not fault, f"{kernel.compiled.kernel} ({configuration.name}) on {arch}: {fault}"
    expected = configuration.matrix.get(arch, "")
    matrix = sorted({name for kernel in passed for name in kernel.listing.matrix})
    assert not expected or any(name.startswith(expected) for name in matrix), (
        f"{configuration.name} on {arch}: no {expected} instruction, only {', '.join(matrix) or 'none'}"
    )
    assert not configuration.by_descriptors or any(
        kernel.listing.loads_in_loop and set(kernel.listing.loads) == {BLOCK_LOAD_BITS} for kernel in passed
    ), f"{configuration.name} on {arch}: no loop that loads by descriptors alone"
    return passed


def _fault(configuration: Configuration, compiled: Compiled, code: Listing) -> str:
    if code.spilled:
        return f"{code.spilled} bytes are spilled ({code.registers} registers)"
    if compiled.shared_bytes > SHARED_LIMITS[compiled.arch]:
        return f"{compiled.shared_bytes} bytes of shared memory, at most {SHARED_LIMITS[compiled.arch]}"
    if code.vector_share < configuration.narrow.get(compiled.kernel, configuration.vector_share):
        return f"only {code.vector_share:.0%} of loaded bytes come in wide loads: {code.loads}"
    return ""
