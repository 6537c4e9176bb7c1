"""`linear` in Triton: weights are the matrix units' rows, tokens their columns, so one token wastes 15 of 16.

Every output is one chain over K: blocks of BLOCK_K in rising order within a span, spans added in rising order. Spans
depend on the weight's shape alone. Either each span has programs of its own and a second launch adds them up, or one
program goes through all spans. Both do the same additions, so bits do not depend on the number of tokens.
"""

import functools
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llmd_kernels.dispatch import gpu_of
from llmd_kernels.linear.tiles import MASKED, Tile, find_device, find_tile
from llmd_kernels.target import of_one_depth, target_kind

# Changing these changes the last bits of every result.
BLOCK_K = 64
# A weight that gives fewer programs than this is cut into spans of K, which must not be shorter than MIN_SPAN.
MIN_PROGRAMS = 128
MIN_SPAN = 512

# Up to this number of tokens every span has programs of its own; beyond it depends on which ends first.
MAX_SPLIT_TOKENS = 64
# Tiles of tokens that are computed side by side for one tile of weights, to share what the cache holds.
GROUP = 8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Products summed in float32, the bias added, rounded once."""
    num_tokens, num_inputs = x.shape
    num_outputs = weight.shape[0]
    x, weight = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (x, weight))
    y = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return y
    span = span_of(num_outputs, num_inputs)
    num_spans = triton.cdiv(num_inputs, span)
    launched = tile_of_launch(num_tokens, num_inputs, num_outputs, itemsize=x.itemsize, device=x.device)
    if launched.descriptors and not (_is_aligned(x) and _is_aligned(weight)):
        launched = replace(launched, descriptors=False)
    target = y
    if launched.splits:
        target = torch.empty(num_spans, num_tokens, num_outputs, dtype=torch.float32, device=x.device)
    num_tiles = triton.cdiv(num_tokens, launched.tokens) * triton.cdiv(num_outputs, launched.outputs)
    linear_kernel[(num_tiles, num_spans if launched.splits else 1)](
        _descriptor(x, launched.tokens) if launched.descriptors else x,
        _descriptor(weight, launched.outputs) if launched.descriptors else weight,
        None if launched.splits else bias,
        target,
        num_tokens,
        num_outputs,
        x.stride(0),
        weight.stride(0),
        K=num_inputs,
        SPAN=span,
        SPLITS=launched.splits,
        DESCRIPTORS=launched.descriptors,
        OUTPUTS=launched.outputs,
        TOKENS=launched.tokens,
        BLOCK=BLOCK_K,
        GROUP_SIZE=GROUP,
        num_warps=launched.num_warps,
        num_stages=launched.num_stages,
        **of_one_depth(),
    )
    if launched.splits:
        add_spans_kernel[(num_tokens, triton.cdiv(num_outputs, 1024))](
            target, bias, y, num_tokens, num_outputs, SPANS=num_spans, BLOCK=1024, num_warps=4
        )
    return y


def _is_aligned(rows: Tensor) -> bool:
    """Whether every row begins where a descriptor can point to."""
    return rows.data_ptr() % 16 == 0 and rows.stride(0) * rows.itemsize % 16 == 0


def _descriptor(rows: Tensor, num_rows: int) -> TensorDescriptor:
    """Of blocks of so many rows; what lies beyond the end is zero. It is passed by value, so a graph keeps it."""
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [num_rows, BLOCK_K])


@functools.cache
def span_of(num_outputs: int, num_inputs: int) -> int:
    """Numbers of K that are summed before they are added to those of other spans."""
    num_spans = 1
    while num_spans * triton.cdiv(num_outputs, 64) < MIN_PROGRAMS and num_inputs >= 2 * num_spans * MIN_SPAN:
        num_spans *= 2
    return int(triton.cdiv(triton.cdiv(num_inputs, num_spans), BLOCK_K)) * BLOCK_K


def tile_of_launch(
    num_tokens: int, num_inputs: int, num_outputs: int, *, itemsize: int = 2, device: torch.device
) -> Tile:
    """What each program of a launch of `linear` computes. No bit depends on it."""
    span = span_of(num_outputs, num_inputs)
    if num_tokens <= MAX_SPLIT_TOKENS or itemsize == 4:
        return Tile(*tile(num_tokens, itemsize=itemsize), splits=span < num_inputs and num_tokens <= MAX_SPLIT_TOKENS)
    if num_inputs % BLOCK_K:
        return MASKED
    # Interpreted they are as an H100 has them.
    kind, num_processors = find_device(target_kind() or "sm_90"), _num_processors(device)
    return find_tile(num_tokens, num_inputs, num_outputs, span=span, device=kind, num_processors=num_processors)


@functools.cache
def _num_processors(device: torch.device) -> int | None:
    """None where there is no device to ask."""
    if gpu_of(device).type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(gpu_of(device)).multi_processor_count


def tile(num_tokens: int, *, itemsize: int = 2) -> tuple[int, int, int, int]:
    """(outputs and tokens of a program, warps, stages) for any weight and device. No bit depends on them."""
    if itemsize == 4:
        # No matrix instruction of NVIDIA's multiplies float32 whole: more tokens would spill, or fewer warps.
        return 64, 16 if num_tokens <= 16 else 32, 8, 3
    tokens = min(max(16, triton.next_power_of_2(num_tokens)), 128)
    return (64, tokens, 4, 5) if tokens <= 64 else (128, tokens, 8, 3)


@triton.jit(do_not_specialize=["num_tokens"])
def linear_kernel(
    x,
    weight,
    bias,
    y,
    num_tokens,
    num_outputs,
    x_stride,
    weight_stride,
    K: tl.constexpr,
    SPAN: tl.constexpr,
    SPLITS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Grid: (tiles, spans if SPLITS). y [T, N]; if SPLITS float32 [spans, T, N] without bias.

    x, weight: pointers, or if DESCRIPTORS descriptors of blocks [TOKENS, BLOCK] and [OUTPUTS, BLOCK].
    """
    output_tile, token_tile = tile_of(
        tl.program_id(0), tl.cdiv(num_outputs, OUTPUTS), tl.cdiv(num_tokens, TOKENS), GROUP_SIZE
    )
    outputs = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    tokens = token_tile * TOKENS + tl.arange(0, TOKENS)
    if DESCRIPTORS:
        weight_rows, x_rows = output_tile * OUTPUTS, token_tile * TOKENS
    else:
        # Rows beyond the end read the last: they are not stored, and loads without a mask stay wide and asynchronous.
        weight_rows = weight + tl.minimum(outputs, num_outputs - 1).to(tl.int64)[:, None] * weight_stride
        x_rows = x + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[None, :] * x_stride
    if SPLITS:
        first = tl.program_id(1) * SPAN
        end = tl.minimum(first + SPAN, K)
        total = sum_of(weight, x, weight_rows, x_rows, first, end, K, DESCRIPTORS, OUTPUTS, TOKENS, BLOCK)
        y += tl.program_id(1).to(tl.int64) * num_tokens * num_outputs
    else:
        end = min(SPAN, K)
        total = sum_of(weight, x, weight_rows, x_rows, 0, end, K, DESCRIPTORS, OUTPUTS, TOKENS, BLOCK)
        for first in range(SPAN, K, SPAN):
            end = tl.minimum(first + SPAN, K)
            total += sum_of(weight, x, weight_rows, x_rows, first, end, K, DESCRIPTORS, OUTPUTS, TOKENS, BLOCK)
    if bias is not None:
        total += tl.load(bias + outputs, mask=outputs < num_outputs, other=0.0).to(tl.float32)[:, None]
    places = y + tokens.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    mask = (tokens < num_tokens)[:, None] & (outputs < num_outputs)[None, :]
    tl.store(places, tl.trans(total).to(y.dtype.element_ty), mask=mask)


@triton.jit
def sum_of(
    weight,
    x,
    weight_rows,
    x_rows,
    first,
    end,
    K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`span_sum`; if DESCRIPTORS of blocks of weight and x, whose first rows are weight_rows and x_rows."""
    if DESCRIPTORS:
        total = tl.zeros([OUTPUTS, TOKENS], tl.float32)
        for start in range(first, end, BLOCK):
            total = tl.dot(weight.load([weight_rows, start]), tl.trans(x.load([x_rows, start])), total)
    else:
        total = span_sum(weight_rows, x_rows, first, end, K, OUTPUTS, TOKENS, BLOCK)
    return total


@triton.jit
def span_sum(
    weight_rows, x_rows, first, end, K: tl.constexpr, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    """weight_rows [OUTPUTS, 1], x_rows [1, TOKENS]: their products over first ≤ k < end, float32 [OUTPUTS, TOKENS]."""
    total = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    k = tl.arange(0, BLOCK)
    for start in range(first, end, BLOCK):
        if K % BLOCK == 0:
            left = tl.load(weight_rows + (start + k)[None, :])
            right = tl.load(x_rows + (start + k)[:, None])
        else:
            left = tl.load(weight_rows + (start + k)[None, :], mask=(start + k)[None, :] < K, other=0.0)
            right = tl.load(x_rows + (start + k)[:, None], mask=(start + k)[:, None] < K, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def tile_of(program, num_output_tiles, num_token_tiles, GROUP_SIZE: tl.constexpr):
    """(tile of outputs, tile of tokens): GROUP_SIZE tiles of tokens for one tile of outputs, then the next outputs."""
    group = program // (GROUP_SIZE * num_output_tiles)
    size = tl.minimum(num_token_tiles - group * GROUP_SIZE, GROUP_SIZE)
    within = program % (GROUP_SIZE * num_output_tiles)
    return within // size, group * GROUP_SIZE + within % size


@triton.jit(do_not_specialize=["num_tokens"])
def add_spans_kernel(partials, bias, y, num_tokens, num_outputs, SPANS: tl.constexpr, BLOCK: tl.constexpr):
    """partials [SPANS, T, N] float32 → y [T, N]: spans added in order, then the bias. Grid: (T, blocks of N)."""
    token = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = outputs < num_outputs
    places = token * num_outputs + outputs
    total = tl.load(partials + places, mask=mask, other=0.0)
    for span in tl.static_range(1, SPANS):
        total += tl.load(partials + span * num_tokens.to(tl.int64) * num_outputs + places, mask=mask, other=0.0)
    if bias is not None:
        total += tl.load(bias + outputs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + places, total.to(y.dtype.element_ty), mask=mask)
