"""Which tensors have a hand-written kernel. Imports no Triton: that takes time and is not there on every machine."""

import torch
from torch import Tensor

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def uses_triton(*tensors: Tensor) -> bool:
    """Whether these are on a GPU (NVIDIA's or AMD's) and of the dtypes that the Triton kernels compute with."""
    return all(tensor.is_cuda and tensor.dtype in TRITON_DTYPES for tensor in tensors)
