"""`add_rms_norm` in Triton: one pass, the residual stream read once and written once. Tiles are those of `rms_norm`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.rms_norm.triton_ops import normalized, tile


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sum is rounded to its dtype before it is normalized in float32."""
    num_rows, hidden_size = x.shape
    x, residual = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (x, residual))
    normed, new_residual = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if num_rows:
        block, rows_per_program, num_warps = tile(hidden_size, x.dtype)
        add_rms_norm_kernel[(triton.cdiv(num_rows, rows_per_program),)](
            x,
            residual,
            weight,
            normed,
            new_residual,
            num_rows,
            x.stride(0),
            residual.stride(0),
            eps,
            weight_offset,
            HIDDEN=hidden_size,
            BLOCK=block,
            ROWS=rows_per_program,
            num_warps=num_warps,
        )
    return normed, new_residual


@triton.jit(do_not_specialize=["num_rows"])
def add_rms_norm_kernel(
    x,
    residual,
    weight,
    normed,
    new_residual,
    num_rows,
    x_stride,
    residual_stride,
    eps,
    weight_offset,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x, residual [num_rows, HIDDEN] → normed, new_residual [num_rows, HIDDEN]; a program takes ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (columns < HIDDEN)
    addend = tl.load(x + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    before = tl.load(residual + rows * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
    total = (addend + before).to(new_residual.dtype.element_ty)
    tl.store(new_residual + rows * HIDDEN + columns, total, mask=mask)
    result = normalized(total.to(tl.float32), weight, columns, eps, weight_offset, HIDDEN)
    tl.store(normed + rows * HIDDEN + columns, result, mask=mask)
