"""Triton kernels compiled for GPUs that are not here, what is read from their machine code, and the gates on it."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.proof.binary import listing
from tests.kernels.proof.checks import Configuration, Proof
from tests.kernels.proof.compiler import MATRIX, TARGETS, compiled_for
from tests.kernels.proof.control_flow import Instruction, in_loops
from tests.kernels.proof.gates import check_configuration
from tests.kernels.proof.inputs import meta
from tests.kernels.proof.registry import PROOFS

NVIDIA = [arch for arch in TARGETS if arch.startswith("sm_")]


@triton.jit
def matmul_kernel(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, BLOCK)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BLOCK):
        left = tl.load(a + m * K + start + k[None, :])
        right = tl.load(b + n * K + start + k[:, None])
        total = tl.dot(left, right, total)
    tl.store(c + m * N + n, total)


@triton.jit
def strided_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + 3 * i))


@triton.jit
def scaled_kernel(x, scales, y, num_blocks, BLOCK: tl.constexpr, NARROW: tl.constexpr):
    """A scale a block, which all threads load from one address."""
    i = tl.arange(0, BLOCK)
    for block in range(num_blocks):
        row = tl.load(x + block * BLOCK + i)
        scale = tl.load(scales + block + (i // BLOCK if NARROW else 0))
        tl.store(y + block * BLOCK + i, row * scale)


@triton.jit
def centering_kernel(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.load(x + i)
    tl.store(x + i, row - tl.sum(row, axis=0))


def matmul(*, rows: int = 64, columns: int = 128, **options: Any) -> Configuration:
    def call() -> None:
        a, b = meta(rows, 4096, dtype=torch.bfloat16), meta(columns, 4096, dtype=torch.bfloat16)
        c = meta(rows, columns, dtype=torch.float32)
        matmul_kernel[(1,)](a, b, c, 4096, M=rows, N=columns, BLOCK=64, **options)

    return Configuration("matmul", call, matrix=MATRIX)


@pytest.mark.parametrize("arch", TARGETS)
def test_a_matrix_product_is_read_rightly(arch: str) -> None:
    (passed,) = check_configuration(matmul(), arch)
    code = passed.listing
    assert code.loads_in_loop
    assert any(name.startswith(MATRIX[arch]) for name in code.matrix)
    assert code.vector_share == 1
    assert code.spilled == 0
    assert 0 < code.registers <= 512
    assert passed.compiled.shared_bytes > 0


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_what_spills_does_not_ship(arch: str) -> None:
    def call() -> None:
        centering_kernel[(1,)](meta(32768, dtype=torch.float32), BLOCK=32768, num_warps=1)

    with pytest.raises(AssertionError, match="bytes are spilled"):
        check_configuration(Configuration("a row too long for one warp", call), arch)


def test_what_needs_too_much_shared_memory_does_not_ship() -> None:
    with pytest.raises(AssertionError, match="bytes of shared memory, at most"):
        check_configuration(matmul(rows=128, columns=256, num_warps=8, num_stages=8), "sm_80")


def test_what_does_not_use_the_matrix_units_does_not_ship() -> None:
    """Hopper's wgmma takes 64 rows at least."""
    with pytest.raises(AssertionError, match="no HGMMA instruction"):
        check_configuration(matmul(rows=16, columns=16), "sm_90")


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_what_loads_number_by_number_does_not_ship(arch: str) -> None:
    def call() -> None:
        strided_kernel[(1,)](meta(4096, dtype=torch.bfloat16), meta(1024, dtype=torch.bfloat16), BLOCK=1024)

    with pytest.raises(AssertionError, match="only 0% of loaded bytes come in wide loads"):
        check_configuration(Configuration("strided", call), arch)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_a_number_that_all_threads_share_is_no_narrow_load(arch: str) -> None:
    def call(*, narrow: bool) -> None:
        x, scales = meta(65536, dtype=torch.float32), meta(64, dtype=torch.float32)
        scaled_kernel[(1,)](x, scales, x, 64, BLOCK=1024, NARROW=narrow)

    (passed,) = check_configuration(Configuration("a scale a block", lambda: call(narrow=False)), arch)
    assert passed.listing.loads_in_loop
    assert passed.listing.vector_share == 1
    with pytest.raises(AssertionError, match="of loaded bytes come in wide loads"):
        check_configuration(Configuration("a scale a number", lambda: call(narrow=True)), arch)


def test_a_loop_is_what_can_come_again() -> None:
    """Not what lies between a branch and where it leads: code that is seldom run lies behind the rest."""
    code = [
        Instruction("before"),
        Instruction("body", label="loop"),
        Instruction("seldom", target="wait"),
        Instruction("body", label="goes on"),
        Instruction("again", target="loop"),
        Instruction("behind", target="cold"),
        Instruction("behind", label="back"),
        Instruction("end", goes_on=False),
        Instruction("waits", label="wait", target="wait"),
        Instruction("and returns", target="goes on", goes_on=False),
        Instruction("cold", label="cold", target="back", goes_on=False),
    ]
    looping = {line.name for line, loops in zip(code, in_loops(code), strict=True) if loops}
    assert looping == {"body", "seldom", "again", "waits", "and returns"}


def test_a_listing_is_remembered_for_the_same_code() -> None:
    with compiled_for("sm_90") as kernels:
        matmul().call()
        matmul().call()
    assert kernels[0].code == kernels[1].code
    assert listing(kernels[0]) == listing(kernels[1])


@pytest.mark.slow
@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.name)
def test_shipped_configurations_pass_the_gates(proof: Proof) -> None:
    """One configuration an operation for Hopper and for CDNA3; `scripts/check-kernels --all` takes them all."""
    for arch in ("sm_90", "gfx942"):
        shipped = [c for c in proof.configurations if arch in (c.archs or TARGETS)]
        check_configuration(shipped[len(shipped) // 2], arch)
