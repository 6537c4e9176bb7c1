"""Random numbers for the proofs. The same at every call with the same seed."""

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def apart(rows: Tensor, gap: int = 8) -> Tensor:
    """The same rows, with `gap` poisoned numbers between them: what a slice of a wider tensor looks like."""
    wide = torch.full((rows.shape[0], rows.shape[1] + gap), torch.nan, dtype=rows.dtype)
    wide[:, : rows.shape[1]] = rows
    return wide[:, : rows.shape[1]]


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor that has no memory, for the compiler."""
    return torch.empty(shape, dtype=dtype, device="meta")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
