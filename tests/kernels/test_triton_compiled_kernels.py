"""A second start finds what the first one compiled. The GPU is only pretended."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.cache import triton_key

from llmd_kernels import rms_norm
from llmd_kernels.compiled_kernels import keep_compiled_kernels
from llmd_kernels.rms_norm.triton_ops import rms_norm_kernel
from tests.kernels.proof.compiler import compiled_for

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

GPU = torch.device("cuda", 0)


@pytest.fixture
def _cache_as_before() -> Iterator[None]:
    with triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        yield
    rms_norm_kernel.device_caches.clear()


@pytest.mark.usefixtures("_cache_as_before")
def test_what_triton_must_know_of_itself_is_found_out_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    triton_key.cache_clear()
    keep_compiled_kernels(tmp_path, GPU)
    for thread in threading.enumerate():
        if thread.name == "triton version":
            thread.join()
    assert triton_key.cache_info().currsize == 1


@pytest.mark.usefixtures("_cache_as_before")
def test_a_kernel_is_compiled_once_for_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    hits: list[bool] = []

    def listen(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    triton.knobs.compilation.listener = listen
    folders = set()
    for _ in range(2):
        folders.add(keep_compiled_kernels(tmp_path / "kernels", GPU))
        # as in a new process
        rms_norm_kernel.device_caches.clear()
        with FakeTensorMode(), compiled_for("sm_90"):
            x = torch.empty(4, 128, dtype=torch.bfloat16, device="cuda")
            rms_norm(x, torch.empty(128, dtype=torch.bfloat16, device="cuda"), 1e-5)
    assert hits == [False, True]
    (folder,) = folders
    assert folder.name.startswith("NVIDIA-H100-80GB-HBM3-torch-")
    assert list(folder.glob("*/*.cubin"))
