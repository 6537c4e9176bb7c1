"""The interpreter that proves Triton kernels: its numbers are the hardware's, and it sees what happens to memory."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.proof.interpreter import interpreted
from tests.kernels.proof.memory import OutOfBounds, Race

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def copy_kernel(x, y, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    tl.store(y + i, tl.load(x + i, mask=mask).to(y.dtype.element_ty), mask=mask)


@triton.jit
def blocks_kernel(x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(y + rows[:, None] * COLUMNS + columns, x.load([tl.program_id(0) * ROWS, 0]))


@triton.jit
def arithmetic_kernel(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + SIZE + i, a * b)
    tl.store(out + 2 * SIZE + i, tl.maximum(a, b))
    tl.store(out + 3 * SIZE + i, tl.where(a < b, a, -b))
    tl.store(out + 4 * SIZE + i, a + 2 * b)


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m * N + n[None, :], tl.dot(left, right))


@triton.jit
def loop_kernel(x, lens, sums, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    length = tl.load(lens + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x + row * SIZE + i, mask=i < length, other=0.0)
    tl.store(sums + row, total.sum(axis=0))


@triton.jit
def add_to_kernel(x, i, step):
    tl.store(x + i, tl.load(x + i) + step)


@triton.jit
def overlapping_kernel(y, BLOCK: tl.constexpr):
    tl.store(y + tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


@triton.jit
def last_arriver_kernel(partials, counter, y, num_programs, RELEASE: tl.constexpr):
    """Each program stores its part; the last one to arrive adds all parts in order."""
    program = tl.program_id(0)
    tl.store(partials + program, (program + 1).to(tl.float32))
    arrived = tl.atomic_add(counter, 1, sem=RELEASE)
    if arrived == num_programs - 1:
        total = 0.0
        for other in range(num_programs):
            total += tl.load(partials + other)
        tl.store(y, total)


def patterns(dtype: torch.dtype) -> Tensor:
    """Every number of a 16-bit or 8-bit dtype."""
    bits = 8 * dtype.itemsize
    unsigned = torch.arange(2**bits, dtype=torch.int32).to(torch.uint8 if bits == 8 else torch.uint16)
    return unsigned.view(dtype)


def copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.zeros(x.shape, dtype=dtype)
    with interpreted():
        copy_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    return y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FLOAT8])
def test_widening_is_exact(dtype: torch.dtype) -> None:
    x = patterns(dtype)
    torch.testing.assert_close(copied(x, torch.float32), x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FLOAT8])
def test_narrowing_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    """Ties, denormals, values just beside ties; float8 saturates as `cvt.rn.satfinite` does."""
    exact = patterns(dtype).float()
    exact = exact[exact.isfinite()].unique()
    ties = (exact[1:].double() + exact[:-1].double()).div(2).float()
    largest = torch.finfo(dtype).max
    x = torch.cat([exact, ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(-torch.inf))])
    x = torch.cat([x, torch.randn(5000, generator=torch.Generator().manual_seed(0)) * largest**0.5])
    assert torch.equal(copied(x, dtype).float(), x.to(dtype).float())
    beyond = copied(torch.tensor([3e38, -3e38, torch.nan]), dtype).float()
    assert beyond[2].isnan()
    if dtype in FLOAT8:
        assert beyond[:2].tolist() == [largest, -largest]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_rounds_once_an_operation(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, generator=g).to(dtype), torch.randn(64, generator=g).to(dtype)
    y[3] = torch.nan  # a maximum ignores it
    out = torch.empty(5, 64, dtype=dtype)
    with interpreted():
        arithmetic_kernel[(1,)](x, y, out, SIZE=64)
    expected = torch.stack([x + y, x * y, torch.fmax(x, y), torch.where(x < y, x, -y), x + 2 * y])
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_a_scalar_truth_masks_a_block() -> None:
    @triton.jit
    def kernel(x, y, size):
        i = tl.arange(0, 8)
        mask = (i < size) & (tl.load(x) >= 0)
        tl.store(y + i, tl.load(x + i, mask=mask, other=9))

    y = torch.empty(2, 8, dtype=torch.int32)
    with interpreted():
        kernel[(1,)](torch.arange(5, dtype=torch.int32), y[0], 5)
        kernel[(1,)](torch.arange(-1, 4, dtype=torch.int32), y[1], 5)
    assert y.tolist() == [[0, 1, 2, 3, 4, 9, 9, 9], [9] * 8]


def test_a_reduction_of_bfloat16_is_refused() -> None:
    @triton.jit
    def kernel(x, y):
        tl.store(y, tl.sum(tl.load(x + tl.arange(0, 8)), axis=0))

    with interpreted(), pytest.raises(TypeError, match="widen to float32"):
        kernel[(1,)](torch.zeros(8).bfloat16(), torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, *FLOAT8])
def test_dot_multiplies_numbers(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 64, generator=g).to(dtype), torch.randn(64, 32, generator=g).to(dtype)
    c = torch.empty(16, 32)
    with interpreted():
        dot_kernel[(1,)](a, b, c, M=16, N=32, K=64)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_dot_of_integers() -> None:
    a, b = torch.randint(-127, 127, (16, 64), dtype=torch.int8), torch.randint(-127, 127, (64, 32), dtype=torch.int8)
    c = torch.empty(16, 32, dtype=torch.int32)
    with interpreted():
        dot_kernel[(1,)](a, b, c, M=16, N=32, K=64)
    assert torch.equal(c, a.int() @ b.int())


def test_a_loop_may_end_at_a_loaded_number() -> None:
    x, lens = torch.ones(3, 40), torch.tensor([40, 0, 17], dtype=torch.int32)
    sums = torch.empty(3)
    with interpreted(shuffle=0) as launches:
        loop_kernel[(3,)](x, lens, sums, SIZE=40, BLOCK=16)
    assert sums.tolist() == [40, 0, 17]
    region = launches[0].memory.region("x")
    assert region.loaded == region.distinct_loaded == 57 * 4
    assert launches[0].memory.region("sums").stored == 3 * 4


def test_outside_of_the_context_nothing_has_changed() -> None:
    with interpreted():
        copy_kernel[(1,)](torch.ones(4), torch.ones(4), 4, BLOCK=4)
    assert not triton.knobs.runtime.interpret
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        copy_kernel(1)
    with pytest.raises(ValueError, match="_semantic"):
        tl.arange(0, 4)


def test_new_memory_is_poisoned() -> None:
    with interpreted():
        assert torch.empty(1000).isnan().all()


# Planted faults.


def test_a_lane_without_its_mask_is_out_of_bounds() -> None:
    x, y = torch.zeros(64)[:50], torch.zeros(64)
    with interpreted(), pytest.raises(OutOfBounds, match=r"load out of bounds in 14 of 64 lanes.*byte 200 of x"):
        copy_kernel[(1,)](x, y, 64, BLOCK=64)
    with interpreted(), pytest.raises(OutOfBounds, match="store out of bounds in 14 of 64 lanes"):
        copy_kernel[(1,)](y, x, 64, BLOCK=64)


def test_a_length_that_is_one_too_long_is_out_of_bounds() -> None:
    lens = torch.tensor([40, 41], dtype=torch.int32)
    with interpreted(), pytest.raises(OutOfBounds, match="program 1: load"):
        loop_kernel[(2,)](torch.ones(2, 40), lens, torch.empty(2), SIZE=40, BLOCK=16)


def test_a_descriptor_gives_zeros_beyond_the_end_and_reads_nothing_there() -> None:
    x, y = torch.randn(5, 10).bfloat16(), torch.empty(8, 16, dtype=torch.bfloat16)
    wide = torch.nn.functional.pad(x, (0, 6), value=torch.nan)
    with interpreted() as launches:
        descriptor = TensorDescriptor(wide, [5, 10], [16, 1], [4, 16])
        blocks_kernel[(2,)](descriptor, y, ROWS=4, COLUMNS=16)
    assert torch.equal(y, torch.nn.functional.pad(x, (0, 6, 0, 3)))
    assert launches[0].memory.region("x").loaded == x.numel() * 2


def test_a_descriptor_of_more_than_there_is_is_out_of_bounds() -> None:
    x, y = torch.zeros(4, 16), torch.empty(8, 16)
    with pytest.raises(OutOfBounds, match="load out of bounds"), interpreted():
        blocks_kernel[(2,)](TensorDescriptor(x, [5, 16], [16, 1], [4, 16]), y, ROWS=4, COLUMNS=16)


def test_overlapping_stores_are_a_race() -> None:
    with interpreted(), pytest.raises(Race, match="store of 1 numbers of y that program 0 stored"):
        overlapping_kernel[(3,)](torch.empty(100), BLOCK=16)


def test_two_programs_on_one_number_are_a_race() -> None:
    with interpreted(), pytest.raises(Race, match="that program 0 stored"):
        add_to_kernel[(2,)](torch.zeros(1), 0, 1.0)


def test_two_lanes_of_one_store_on_one_number_are_a_race() -> None:
    @triton.jit
    def kernel(y):
        tl.store(y + tl.arange(0, 8) // 2, tl.zeros([8], tl.float32))

    with interpreted(), pytest.raises(Race, match="two lanes"):
        kernel[(1,)](torch.zeros(8))


@pytest.mark.parametrize("shuffle", [None, 0, 1])
def test_the_last_arriver_may_read_what_others_released(shuffle: int | None) -> None:
    y, counter = torch.empty(1), torch.zeros(1, dtype=torch.int32)
    with interpreted(shuffle=shuffle):
        last_arriver_kernel[(5,)](torch.empty(5), counter, y, 5, RELEASE="acq_rel")
    assert y.item() == 15


@pytest.mark.parametrize("ordering", ["relaxed", "release", "acquire"])
def test_a_last_arriver_without_acquire_and_release_races(ordering: str) -> None:
    counter = torch.zeros(1, dtype=torch.int32)
    with interpreted(), pytest.raises(Race, match="load of 1 numbers of partials that program 0 stored"):
        last_arriver_kernel[(5,)](torch.empty(5), counter, torch.empty(1), 5, RELEASE=ordering)


def test_what_was_never_written_is_counted() -> None:
    y = torch.empty(100)
    with interpreted() as launches:
        copy_kernel[(1,)](torch.zeros(100), y, 90, BLOCK=128)
    assert launches[0].unwritten("y") == 10


def test_an_integer_that_overflows_is_an_error_when_asked_for() -> None:
    @triton.jit
    def kernel(y, big):
        tl.store(y, big * big)

    with interpreted(check_overflow=True), pytest.raises(AssertionError, match="overflow"):
        kernel[(1,)](torch.zeros(1, dtype=torch.int32), 2**20)
