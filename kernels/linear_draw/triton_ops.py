"""`linear_draw` in Triton: each program keeps the best token of its tile, a second launch the best of the tiles.

Products come from `linear`'s own chain, rounded as it rounds them; logits and noise from the functions that the
sampler uses. So a token is the one that `linear` and `sample_on_device` give.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.linear.triton_ops import BLOCK_K, span_of, span_sum, tile, tile_of
from llmd_kernels.linear.triton_ops import GROUP as TOKEN_TILES_TOGETHER
from llmd_kernels.sample.triton_noise import best_of, gumbel, noisy, pick_kernel
from llmd_kernels.scale_logits.triton_ops import scaled
from llmd_kernels.target import of_one_depth

# Tokens of the vocabulary and rows of a program at most. No bit depends on them.
OUTPUTS = 64
MAX_ROWS = 64


def linear_draw(
    x: Tensor,
    weight: Tensor,
    temperatures: Tensor,
    *,
    seeds: Tensor,
    choices: Tensor,
    positions: Tensor,
    divisor: float = 1.0,
    soft_cap: float | None = None,
) -> Tensor:
    """Two launches."""
    num_rows, num_inputs = x.shape
    num_tokens = weight.shape[0]
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=x.device)
    if num_rows == 0:
        return token_ids
    x, weight = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (x, weight))
    num_tiles = triton.cdiv(num_tokens, OUTPUTS)
    # Rows of them begin where wide loads may.
    stride = triton.cdiv(num_tiles, 16) * 16
    best_scores = torch.empty(num_rows, stride, dtype=torch.float32, device=x.device)
    best_ids = torch.empty(num_rows, stride, dtype=torch.int32, device=x.device)
    _, tile_rows, num_warps, num_stages = tile(min(num_rows, MAX_ROWS), itemsize=x.itemsize)
    linear_draw_kernel[(num_tiles * triton.cdiv(num_rows, tile_rows),)](
        x,
        weight,
        temperatures,
        seeds,
        choices,
        positions,
        best_scores,
        best_ids,
        num_rows,
        num_tokens,
        x.stride(0),
        weight.stride(0),
        stride,
        divisor,
        1.0 if soft_cap is None else soft_cap,
        DIVIDES=divisor != 1,
        CAPS=soft_cap is not None,
        K=num_inputs,
        SPAN=span_of(num_tokens, num_inputs),
        TOKENS=OUTPUTS,
        ROWS=tile_rows,
        BLOCK=BLOCK_K,
        GROUP_SIZE=TOKEN_TILES_TOGETHER,
        num_warps=num_warps,
        num_stages=num_stages,
        **of_one_depth(),
    )
    pick_kernel[(num_rows,)](
        best_scores,
        best_ids,
        token_ids,
        num_tiles,
        stride,
        num_tokens,
        PARTS=min(1024, triton.next_power_of_2(num_tiles)),
    )
    return token_ids


@triton.jit(do_not_specialize=["num_rows"])
def linear_draw_kernel(
    x,
    weight,
    temperatures,
    seeds,
    choices,
    positions,
    best_scores,
    best_ids,
    num_rows,
    num_tokens,
    x_stride,
    weight_stride,
    best_stride,
    divisor,
    soft_cap,
    DIVIDES: tl.constexpr,
    CAPS: tl.constexpr,
    K: tl.constexpr,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """TOKENS of the vocabulary for ROWS rows of x. Grid: (tiles,). best_scores, best_ids [R, best_stride]."""
    num_token_tiles = tl.cdiv(num_tokens, TOKENS)
    token_tile, row_tile = tile_of(tl.program_id(0), num_token_tiles, tl.cdiv(num_rows, ROWS), GROUP_SIZE)
    token_ids = token_tile * TOKENS + tl.arange(0, TOKENS)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    # Rows beyond the end read the last one, as in `linear`.
    weight_rows = weight + tl.minimum(token_ids, num_tokens - 1).to(tl.int64)[:, None] * weight_stride
    x_rows = x + tl.minimum(rows, num_rows - 1).to(tl.int64)[None, :] * x_stride
    total = span_sum(weight_rows, x_rows, 0, min(SPAN, K), K, TOKENS, ROWS, BLOCK)
    for first in range(SPAN, K, SPAN):
        total += span_sum(weight_rows, x_rows, first, tl.minimum(first + SPAN, K), K, TOKENS, ROWS, BLOCK)
    products = tl.trans(total).to(x.dtype.element_ty).to(tl.float32)
    score = scaled(products, divisor, soft_cap, DIVIDES, CAPS)
    row_mask = rows < num_rows
    temperature = tl.load(temperatures + rows, mask=row_mask, other=0.0)
    if tl.max(temperature, axis=0) > 0.0:
        seed = tl.load(seeds + rows, mask=row_mask, other=0)
        position = tl.load(positions + rows, mask=row_mask, other=0)
        choice = tl.load(choices + rows, mask=row_mask, other=0)
        groups = token_tile * (TOKENS // 4) + tl.arange(0, TOKENS // 4)
        noise = gumbel(groups[None, :], seed[:, None], position[:, None], choice[:, None])
        score = noisy(score, temperature[:, None], tl.reshape(noise, [ROWS, TOKENS]))
    score = tl.where((token_ids < num_tokens)[None, :], score, float("-inf"))
    best, best_id = best_of(score, token_ids[None, :], 1)
    places = rows.to(tl.int64)[:, None] * best_stride + token_tile
    tl.store(best_scores + places, best, mask=row_mask[:, None])
    tl.store(best_ids + places, best_id, mask=row_mask[:, None])
