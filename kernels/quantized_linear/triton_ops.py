"""`quantized_linear` in Triton: `linear`'s kernel, whose weights become 16-bit numbers in registers.

Each block of 64 inputs is unpacked, rounded to x's dtype and multiplied as `linear` does it, in the same spans: a
result has the bits that `linear` gives for the dequantised weight. So many tokens may dequantise it once instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.linear import triton_ops as plain
from llmd_kernels.linear.triton_ops import add_spans_kernel, tile_of
from llmd_kernels.quantized_linear.tiles import registers, tile
from llmd_kernels.quantized_linear.triton_unpack import (
    device_of,
    has_kernel,
    operands,
    rows_of,
    scales_of,
    span_sum,
    step,
    unpacked,
)
from llmd_kernels.quantized_linear.weights import Float8Weight, IntWeight, QuantizedWeight, dequantized
from llmd_kernels.target import of_one_depth

BLOCK_K = plain.BLOCK_K
# Above this number of tokens the weight is dequantised once, in memory: each tile of tokens would do it again.
MAX_TOKENS = 1024


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Products summed in float32 in the order of `input_order`, the bias added, rounded once."""
    if isinstance(weight, IntWeight) and weight.input_order is not None:
        x = x.index_select(1, weight.input_order)
    num_tokens, num_inputs = x.shape
    if num_tokens > MAX_TOKENS or not has_kernel(weight):
        return plain.linear(x, numbers(weight, x.dtype), bias)
    num_outputs = weight.num_outputs
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return y
    weights = operands(weight)
    outputs, tokens, num_warps, num_stages = tile(num_tokens, weights["SCALE_INPUTS"], weights["KIND"])
    span = plain.span_of(num_outputs, num_inputs)
    num_spans = triton.cdiv(num_inputs, span)
    splits = num_spans > 1 and num_tokens <= plain.MAX_SPLIT_TOKENS
    target = y
    if splits:
        target = torch.empty(num_spans, num_tokens, num_outputs, dtype=torch.float32, device=x.device)
    num_tiles = triton.cdiv(num_tokens, tokens) * triton.cdiv(num_outputs, outputs)
    quantized_linear_kernel[(num_tiles, num_spans if splits else 1)](
        x,
        None if splits else bias,
        target,
        num_tokens,
        num_outputs,
        x.stride(0),
        **weights,
        K=num_inputs,
        SPAN=span,
        STEP=step(num_inputs, span, weights["SCALE_INPUTS"]),
        SPLITS=splits,
        OUTPUTS=outputs,
        TOKENS=tokens,
        BLOCK=BLOCK_K,
        TILE_GROUP=plain.GROUP,
        num_warps=num_warps,
        num_stages=num_stages,
        **of_one_depth(),
        **registers(tokens, weights["KIND"]),
    )
    if splits:
        add_spans_kernel[(num_tokens, triton.cdiv(num_outputs, 1024))](
            target, bias, y, num_tokens, num_outputs, SPANS=num_spans, BLOCK=1024, num_warps=4
        )
    return y


def numbers(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The numbers that the product multiplies [N, K]: `dequantized`, but in the order of `input_order`."""
    if not has_kernel(weight):
        assert isinstance(weight, Float8Weight)
        return dequantized(weight, dtype)
    num_outputs, num_inputs = weight.num_outputs, weight.num_inputs
    rows = torch.empty(num_outputs, num_inputs, dtype=dtype, device=device_of(weight))
    dequantize_kernel[(triton.cdiv(num_outputs, 64), triton.cdiv(num_inputs, 4 * BLOCK_K))](
        rows, num_outputs, **operands(weight), K=num_inputs, OUTPUTS=64, BLOCK=BLOCK_K, BLOCKS=4, num_warps=4
    )
    return rows


@triton.jit(do_not_specialize=["num_tokens"])
def quantized_linear_kernel(
    x,
    bias,
    y,
    num_tokens,
    num_outputs,
    x_stride,
    weights,
    scales,
    weight_stride,
    scale_stride,
    group_stride,
    KIND: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SCALE_OUTPUTS: tl.constexpr,
    SCALE_INPUTS: tl.constexpr,
    K: tl.constexpr,
    SPAN: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_GROUP: tl.constexpr,
):
    """Grid: (tiles, spans if SPLITS). y [T, N]; if SPLITS float32 [spans, T, N] without bias. Weights: see README."""
    output_tile, token_tile = tile_of(
        tl.program_id(0), tl.cdiv(num_outputs, OUTPUTS), tl.cdiv(num_tokens, TOKENS), TILE_GROUP
    )
    outputs = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    tokens = token_tile * TOKENS + tl.arange(0, TOKENS)
    # Rows beyond the end read the last one: they are not stored, and loads without a mask stay wide and asynchronous.
    rows = tl.minimum(outputs, num_outputs - 1)
    weight_rows = rows_of(weights, rows, weight_stride, KIND, K, BLOCK)
    scale_rows = scales + rows // SCALE_OUTPUTS * scale_stride
    x_rows = x + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[None, :] * x_stride
    if SPLITS:
        first = tl.program_id(1) * SPAN
        total = span_sum(
            weight_rows, scale_rows, x_rows, first, tl.minimum(first + SPAN, K), group_stride,
            KIND, SCALE_DTYPE, SCALE_INPUTS, K, STEP, OUTPUTS, TOKENS, BLOCK,
        )  # fmt: skip
        y += tl.program_id(1).to(tl.int64) * num_tokens * num_outputs
    else:
        total = span_sum(
            weight_rows, scale_rows, x_rows, 0, min(SPAN, K), group_stride,
            KIND, SCALE_DTYPE, SCALE_INPUTS, K, STEP, OUTPUTS, TOKENS, BLOCK,
        )  # fmt: skip
        for first in range(SPAN, K, SPAN):
            total += span_sum(
                weight_rows, scale_rows, x_rows, first, tl.minimum(first + SPAN, K), group_stride,
                KIND, SCALE_DTYPE, SCALE_INPUTS, K, STEP, OUTPUTS, TOKENS, BLOCK,
            )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + outputs, mask=outputs < num_outputs, other=0.0).to(tl.float32)[:, None]
    places = y + tokens.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    mask = (tokens < num_tokens)[:, None] & (outputs < num_outputs)[None, :]
    tl.store(places, tl.trans(total).to(y.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_kernel(
    y,
    num_outputs,
    weights,
    scales,
    weight_stride,
    scale_stride,
    group_stride,
    KIND: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SCALE_OUTPUTS: tl.constexpr,
    SCALE_INPUTS: tl.constexpr,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """y [N, K]. Grid: (blocks of OUTPUTS, BLOCKS blocks of inputs)."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.minimum(outputs, num_outputs - 1)
    weight_rows = rows_of(weights, rows, weight_stride, KIND, K, BLOCK)
    scale_rows = scales + rows // SCALE_OUTPUTS * scale_stride
    first = tl.program_id(1) * BLOCK * BLOCKS
    dtype: tl.constexpr = y.dtype.element_ty
    for start in range(first, tl.minimum(first + BLOCK * BLOCKS, K), BLOCK):
        scale, zero = scales_of(scale_rows, start, group_stride, dtype, KIND, SCALE_DTYPE, SCALE_INPUTS, K, BLOCK)
        block = unpacked(weight_rows, start, scale, zero, dtype, KIND, K, BLOCK)
        k = (start + tl.arange(0, BLOCK))[None, :]
        mask = (outputs < num_outputs)[:, None] & (k < K)
        tl.store(y + outputs.to(tl.int64)[:, None] * K + k, block, mask=mask)
