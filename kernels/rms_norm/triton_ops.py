"""`rms_norm` in Triton: whole rows in registers, read once and written once.

A row's sum is taken in one tree that depends on the row's length and dtype alone (columns, warps and rows of a program
are functions of them), so its bits do not depend on how many rows there are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bytes of a row that one warp reads: two loads of 16 bytes a thread.
BYTES_PER_WARP = 1024
MAX_WARPS = 32
MAX_HIDDEN_SIZE = 65536


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0) -> Tensor:
    """Computed in float32, rounded once."""
    hidden_size = x.shape[-1]
    rows = x.reshape(-1, hidden_size)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows = rows.shape[0]
    if num_rows:
        block, rows_per_program, num_warps = tile(hidden_size, x.dtype)
        rms_norm_kernel[(triton.cdiv(num_rows, rows_per_program),)](
            rows,
            weight,
            y,
            num_rows,
            rows.stride(0),
            eps,
            weight_offset,
            HIDDEN=hidden_size,
            BLOCK=block,
            ROWS=rows_per_program,
            num_warps=num_warps,
        )
    return y


def tile(hidden_size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(columns of a tile, its rows, warps of a program) for rows of this length. Changing it changes last bits."""
    if hidden_size > MAX_HIDDEN_SIZE:
        raise ValueError(f"a row of {hidden_size} numbers does not fit in registers; at most {MAX_HIDDEN_SIZE}")
    block = triton.next_power_of_2(hidden_size)
    # Short rows (the heads of a query) share a program, so that a warp has something to load.
    rows_per_program = max(1, BYTES_PER_WARP // (block * dtype.itemsize))
    num_warps = min(max(1, block * dtype.itemsize // BYTES_PER_WARP), MAX_WARPS)
    return block, rows_per_program, num_warps


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x,
    weight,
    y,
    num_rows,
    x_stride,
    eps,
    weight_offset,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x [num_rows, HIDDEN] with rows x_stride apart → y [num_rows, HIDDEN]; a program takes ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (columns < HIDDEN)
    wide = tl.load(x + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    normed = normalized(wide, weight, columns, eps, weight_offset, HIDDEN)
    tl.store(y + rows * HIDDEN + columns, normed, mask=mask)


@triton.jit
def normalized(wide, weight, columns, eps, weight_offset, HIDDEN: tl.constexpr):
    """wide [ROWS, BLOCK] float32, zero behind HIDDEN → its rows normalized and weighted, float32."""
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / HIDDEN + eps)
    factor = tl.load(weight + columns, mask=columns < HIDDEN, other=0.0).to(tl.float32) + weight_offset
    return wide * scale[:, None] * factor
