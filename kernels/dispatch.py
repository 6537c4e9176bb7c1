"""Which tensors have a hand-written kernel. Imports no Triton: that takes time and is not there on every machine."""

import torch
from torch import Tensor

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# NVIDIA's and AMD's GPUs are both called "cuda". Tests that interpret kernels add "cpu".
TRITON_DEVICES = {"cuda"}
# Tensors on it have shapes and dtypes, and no memory: for them kernels are compiled and not run, see compile_ahead.py.
WITHOUT_MEMORY = "meta"

# float8_e4m3fn in registers: NVIDIA's from Ada on. AMD's gfx942 has another float8.
FLOAT8_CAPABILITY = (8, 9)


def uses_float8(*tensors: Tensor) -> bool:
    """Whether these are float8_e4m3fn on a device whose Triton converts it."""
    return all(
        tensor.device.type in TRITON_DEVICES and tensor.dtype == torch.float8_e4m3fn and _converts_float8(tensor.device)
        for tensor in tensors
    )


def _converts_float8(device: torch.device) -> bool:
    device = gpu_of(device)
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


def gpu_of(device: torch.device) -> torch.device:
    """The device that decides which kernels tensors have: those without memory stand for the current GPU's, if any."""
    return torch.device("cuda") if device.type == WITHOUT_MEMORY and torch.cuda.is_available() else device


def on_triton_device(*tensors: Tensor) -> bool:
    """Whether these are on a device for which Triton compiles, of whatever dtype."""
    return all(tensor.device.type in TRITON_DEVICES for tensor in tensors)


def uses_triton(*tensors: Tensor) -> bool:
    """Whether these are on a device for which Triton compiles, and of the dtypes that its kernels compute with."""
    return on_triton_device(*tensors) and all(tensor.dtype in TRITON_DTYPES for tensor in tensors)
