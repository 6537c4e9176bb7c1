"""Where this rank computes and in which precision."""

from typing import Literal

import torch

from llmd.config import Dtype, KvDtype
from llmd.errors import StartupFailed
from llmd.machine import available_main_memory


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device to run on. Raises StartupFailed if a GPU was asked for and this PyTorch sees none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise StartupFailed("--device cuda: this PyTorch sees no GPU (driver missing, or a CPU build of PyTorch)")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0)


def choose_dtype(wanted: Dtype, device: torch.device) -> torch.dtype:
    """The precision of weights and activations."""
    if wanted == "auto":
        # without hardware for it, 16-bit arithmetic on a CPU is slower than float32 and less exact
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, wanted)
    assert isinstance(dtype, torch.dtype)
    return dtype


def choose_kv_dtype(wanted: KvDtype, dtype: torch.dtype) -> torch.dtype:
    """The precision of keys and values; `dtype` is the activations'."""
    if wanted == "auto":
        return dtype
    chosen = torch.float8_e4m3fn if wanted == "fp8" else getattr(torch, wanted)
    assert isinstance(chosen, torch.dtype)
    return chosen


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return available_main_memory()
