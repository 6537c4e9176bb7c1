"""The public functions choose by device and dtype: tensors on a GPU go to Triton. The GPU is only pretended."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llmd_kernels import add_rms_norm, experts, gated_mul, linear, rms_norm, rope_kv_write, route
from tests.kernels.proof.compiler import compiled_for

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


def gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def test_tensors_on_a_gpu_go_to_triton() -> None:
    with FakeTensorMode(), compiled_for("gfx942") as kernels:
        assert rms_norm(gpu(4, 128), gpu(128), 1e-5).shape == (4, 128)
        normed, residual = add_rms_norm(gpu(4, 128), gpu(4, 128), gpu(128), 1e-5)
        assert normed.shape == residual.shape == (4, 128)
        assert gated_mul(gpu(4, 256), "silu").shape == (4, 128)
        assert linear(gpu(4, 64), gpu(256, 64), gpu(256)).shape == (4, 256)
        q = rope_kv_write(
            gpu(4, 6 * 64),
            positions=gpu(4, dtype=torch.int64),
            slots=gpu(4, dtype=torch.int64),
            k_cache=gpu(3, 2, 16, 64),
            v_cache=gpu(3, 2, 16, 64),
            num_heads=2,
            num_kv_heads=2,
            cos_sin=gpu(100, 64, dtype=torch.float32),
        )
        assert (q.shape, q.device.type) == ((4, 2, 64), "cuda")
        expert_ids, weights = route(gpu(4, 8), num_chosen=2, scoring="softmax", renormalize=True)
        assert expert_ids.shape == weights.shape == (4, 2)
        y = experts(gpu(4, 64), expert_ids, weights, gpu(8, 64, 64), gpu(8, 64, 32), activation="silu")
        assert y.shape == (4, 64)
    names = ["rms_norm_kernel", "add_rms_norm_kernel", "gated_mul_kernel", "linear_kernel", "rope_kv_write_kernel"]
    names += ["route_kernel", "group_kernel", "gate_up_kernel", "down_kernel", "add_chosen_kernel"]
    assert [kernel.kernel for kernel in kernels] == names


def test_a_dtype_without_a_kernel_goes_to_pytorch() -> None:
    with FakeTensorMode(), compiled_for("gfx942") as kernels:
        y = rms_norm(gpu(4, 128, dtype=torch.float64), gpu(128, dtype=torch.float64), 1e-5)
    assert (y.dtype, y.device.type) == (torch.float64, "cuda")
    assert kernels == []


def test_triton_is_not_imported_before_a_gpu_needs_it() -> None:
    program = "import sys, llmd_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
