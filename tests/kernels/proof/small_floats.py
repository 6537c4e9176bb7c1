"""Numbers that numpy has no type for: bfloat16 and float8, kept as integers as Triton's interpreter keeps them.

Rounds as the hardware does: to nearest, ties to even; float8 saturates (PTX `cvt.rn.satfinite`).
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl

Array = np.ndarray[Any, np.dtype[Any]]

TORCH_DTYPES: dict[tl.dtype, torch.dtype] = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5: torch.float8_e5m2,
}


def is_small_float(dtype: tl.dtype) -> bool:
    return dtype.scalar in TORCH_DTYPES


def widen(stored: Array, dtype: tl.dtype) -> Array:
    """Stored integers of a small float `dtype` → float32, exactly. Other dtypes pass through."""
    if not is_small_float(dtype):
        return stored
    flat = torch.from_numpy(np.ascontiguousarray(stored))
    wide: Array = flat.view(TORCH_DTYPES[dtype.scalar]).float().numpy().reshape(stored.shape)
    return wide


def narrow(wide: Array, dtype: tl.dtype) -> Array:
    """Numbers → integers that store them as a small float `dtype`."""
    torch_dtype = TORCH_DTYPES[dtype.scalar]
    flat = torch.from_numpy(np.ascontiguousarray(wide, dtype=np.float32))
    if torch_dtype.itemsize == 1:
        largest = torch.finfo(torch_dtype).max
        flat = flat.clamp(-largest, largest)
    unsigned = torch.uint16 if torch_dtype.itemsize == 2 else torch.uint8
    stored: Array = flat.to(torch_dtype).view(unsigned).numpy().reshape(wide.shape)
    return stored
