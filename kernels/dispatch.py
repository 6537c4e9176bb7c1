"""Which tensors have a hand-written kernel. Imports no Triton: that takes time and is not there on every machine."""

import torch
from torch import Tensor

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# NVIDIA's and AMD's GPUs are both called "cuda". Tests that interpret kernels add "cpu".
TRITON_DEVICES = {"cuda"}


def uses_triton(*tensors: Tensor) -> bool:
    """Whether these are on a device for which Triton compiles, and of the dtypes that its kernels compute with."""
    return all(tensor.device.type in TRITON_DEVICES and tensor.dtype in TRITON_DTYPES for tensor in tensors)
