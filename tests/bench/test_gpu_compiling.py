"""Kernels are compiled by processes beside the one that measures: none of them waits for ever, none is waited for."""

import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is built for Linux alone", allow_module_level=True)

from triton import knobs

from bench.gpu import compiling
from bench.gpu.compiling import compile_all, compile_pool
from llmd_kernels import dispatch, gated_mul


def machine(device: str) -> Any:
    return SimpleNamespace(arch="sm_90", device=torch.device(device))


def add_many() -> None:
    """So many that torch adds them with all of its threads."""
    numbers = torch.ones(1 << 22)
    assert (numbers + numbers)[-1] == 2


def launch(size: int) -> None:
    gated_mul(torch.empty(3, 2 * size, dtype=torch.bfloat16, device="meta"), "silu")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_work_that_would_use_the_threads_of_the_process_it_was_forked_from() -> None:
    add_many()
    with compile_pool(2) as pool:
        found = compile_all(pool, machine("cpu"), [add_many] * 4)
    assert (found["launches"], found["errors"]) == (4, 0)


def test_a_process_that_dies_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_PATIENCE", 5.0)
    with compile_pool(2) as pool:
        found = compile_all(pool, machine("cpu"), [add_many, functools.partial(os._exit, 1), add_many])
    assert (found["errors"], found["first error"]) == (1, "1 of 3 were never heard of again")


@pytest.mark.parametrize(("device", "num_launchers"), [("cuda", 2), ("cpu", 0)])
def test_kernels_have_their_launchers_where_there_is_a_gpu(
    device: str, num_launchers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of works that fail, too; what a work says of its results is no error, as there are none."""

    def launcher(source: Any, metadata: Any) -> None:
        tmp_path.joinpath(f"launcher of {metadata.name} {source.hash()}").touch()

    monkeypatch.setattr(compiling.driver, "CudaLauncher", launcher)
    monkeypatch.setattr(compiling.driver, "make_launcher", None, raising=False)
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"meta"})
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path / "cache")
        with compile_pool(1) as pool:
            found = compile_all(pool, machine(device), [functools.partial(launch, 64), failing_work, wrong_work])
    assert (found["errors"], found["first error"]) == (1, "RuntimeError: it does not compile")
    assert len(list(tmp_path.glob("launcher of gated_mul_kernel *"))) == num_launchers


def failing_work() -> None:
    launch(96)
    raise RuntimeError("it does not compile")


def wrong_work() -> None:
    launch(96)
    raise AssertionError("what was not computed is not equal")
