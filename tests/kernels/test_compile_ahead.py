"""Kernels compiled before anything is launched: all at once, none twice, and found again by the next process."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from llmd_kernels import add_rms_norm, dispatch, gated_mul, linear
from llmd_kernels.compile_ahead import compiling_ahead
from tests.kernels.proof.compiler import absent_gpu

ROOT = Path(__file__).parents[2]


def work() -> Tensor:
    x = torch.empty(24, 192, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(384, 192, dtype=torch.bfloat16, device="meta")
    normed, _ = add_rms_norm(x, x, weight[0], 1e-5)
    return gated_mul(linear(normed, weight), "silu")


def compiled_into(folder: Path) -> list[Path]:
    """The kernels that the work needs and `folder` lacked."""
    before = set(folder.rglob("*.cubin"))
    with absent_gpu("sm_90"), knobs.cache.scope():
        knobs.cache.dir = str(folder)
        with compiling_ahead(num_threads=2) as compilation:
            assert work().shape == (24, 192)
            assert work().shape == (24, 192)
        assert compilation.launched == ["add_rms_norm_kernel", "linear_kernel", "gated_mul_kernel"] * 2
        assert compilation.num_done == len(compilation.kernels) == 3
    return sorted(set(folder.rglob("*.cubin")) - before)


def test_each_kernel_is_compiled_once_and_for_all_processes(tmp_path: Path) -> None:
    program = f"from tests.kernels.test_compile_ahead import *; print(len(compiled_into(Path({str(tmp_path)!r}))))"
    numbers = [
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert numbers == ["3\n", "0\n"]


def launch_unknown(size: int) -> None:
    """A kernel for a size that no other test of this process has."""
    gated_mul(torch.empty(3, 2 * size, dtype=torch.bfloat16, device="meta"), "silu")


def test_each_kernel_has_its_launcher_before_it_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles one in C for each signature, when a kernel is first launched."""
    made: list[tuple[str, int]] = []
    with absent_gpu("sm_90"), knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        monkeypatch.setattr(
            driver.active,
            "launcher_cls",
            lambda source, metadata: made.append((source.name, metadata.num_warps)),
            raising=False,
        )
        with compiling_ahead(num_threads=2) as compilation:
            launch_unknown(1001)
            launch_unknown(1001)
            launch_unknown(1002)
    assert made == [("gated_mul_kernel", 4)] * 2
    assert [kernel.exception() for kernel in compilation.kernels] == [None] * 2


def test_a_launcher_that_cannot_be_made_is_an_error_of_its_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(source: object, metadata: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    with absent_gpu("sm_90"), knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        monkeypatch.setattr(driver.active, "launcher_cls", no_compiler, raising=False)
        with compiling_ahead(num_threads=2) as compilation:
            launch_unknown(1003)
    assert [str(kernel.exception()) for kernel in compilation.kernels] == ["Failed to find C compiler"]


def test_launches_with_descriptors_are_told_apart_by_their_blocks(tmp_path: Path) -> None:
    weight = torch.empty(384, 192, dtype=torch.bfloat16, device="meta")
    with absent_gpu("sm_90"), knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        with compiling_ahead(num_threads=2) as compilation:
            for num_tokens in (72, 120, 120):
                linear(weight.new_empty(num_tokens, 192), weight)
    assert compilation.launched == ["linear_kernel"] * 3
    assert len(compilation.kernels) == 1
    (ptx,) = tmp_path.rglob("*.ptx")
    assert "cp.async.bulk.tensor" in ptx.read_text()


def test_afterwards_nothing_is_changed() -> None:
    launch = JITFunction.run
    with absent_gpu("sm_90"), pytest.raises(ZeroDivisionError), compiling_ahead(num_threads=1):
        1 / 0  # noqa: B018
    assert JITFunction.run is launch
    assert {"cuda"} == dispatch.TRITON_DEVICES


def test_what_is_cancelled_ends_soon(tmp_path: Path) -> None:
    with absent_gpu("sm_90"), knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        with compiling_ahead(num_threads=1) as compilation:
            work()
            compilation.cancel()
            one = torch.empty(1, 64, dtype=torch.float16, device="meta")
            with pytest.raises(RuntimeError, match="after shutdown"):
                linear(one, one)
    assert any(kernel.cancelled() for kernel in compilation.kernels)
    assert compilation.num_done == len(compilation.kernels)


def test_other_threads_launch_as_ever() -> None:
    launch, launched = JITFunction.run, []
    JITFunction.run = lambda kernel, *_, warmup, **__: launched.append(warmup)  # type: ignore[assignment, method-assign]
    try:
        with compiling_ahead(num_threads=1), ThreadPoolExecutor(1) as other:
            x = torch.empty(8, 64, dtype=torch.float16, device="meta")
            other.submit(linear, x, x).result()
            linear(x, x)
    finally:
        JITFunction.run = launch  # type: ignore[method-assign]
    assert launched == [False, True]
