"""`quantized_linear` in Triton: `linear`'s kernel, whose weights become 16-bit numbers in registers.

Each block of 64 inputs is unpacked, rounded to x's dtype and multiplied as `linear` does it, in the same spans: a
result has the bits that `linear` gives for the dequantised weight. So many tokens may dequantise it once instead.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.kinds import WITH_FLOAT8
from llmd_kernels.linear import triton_ops as plain
from llmd_kernels.linear.triton_ops import add_spans_kernel, tile_of
from llmd_kernels.quantized_linear.tiles import registers, tile
from llmd_kernels.quantized_linear.weights import Float8Weight, IntWeight, QuantizedWeight, dequantized
from llmd_kernels.target import of_one_depth, target_kind

BLOCK_K = plain.BLOCK_K
# Above this number of tokens the weight is dequantised once, in memory: each tile of tokens would do it again.
MAX_TOKENS = 1024
SCALE_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Products summed in float32 in the order of `input_order`, the bias added, rounded once."""
    if isinstance(weight, IntWeight) and weight.input_order is not None:
        x = x.index_select(1, weight.input_order)
    num_tokens, num_inputs = x.shape
    if num_tokens > MAX_TOKENS or not _has_kernel(weight):
        return plain.linear(x, numbers(weight, x.dtype), bias)
    num_outputs = weight.num_outputs
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return y
    operands = _operands(weight)
    outputs, tokens, num_warps, num_stages = tile(num_tokens, operands["SCALE_INPUTS"])
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
        **operands,
        K=num_inputs,
        SPAN=span,
        STEP=_step(num_inputs, span, operands["SCALE_INPUTS"]),
        SPLITS=splits,
        OUTPUTS=outputs,
        TOKENS=tokens,
        BLOCK=BLOCK_K,
        TILE_GROUP=plain.GROUP,
        num_warps=num_warps,
        num_stages=num_stages,
        **of_one_depth(),
        **registers(tokens),
    )
    if splits:
        add_spans_kernel[(num_tokens, triton.cdiv(num_outputs, 1024))](
            target, bias, y, num_tokens, num_outputs, SPANS=num_spans, BLOCK=1024, num_warps=4
        )
    return y


def numbers(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The numbers that the product multiplies [N, K]: `dequantized`, but in the order of `input_order`."""
    if not _has_kernel(weight):
        assert isinstance(weight, Float8Weight)
        return dequantized(weight, dtype)
    num_outputs, num_inputs = weight.num_outputs, weight.num_inputs
    rows = torch.empty(num_outputs, num_inputs, dtype=dtype, device=_device(weight))
    dequantize_kernel[(triton.cdiv(num_outputs, 64), triton.cdiv(num_inputs, 4 * BLOCK_K))](
        rows, num_outputs, **_operands(weight), K=num_inputs, OUTPUTS=64, BLOCK=BLOCK_K, BLOCKS=4, num_warps=4
    )
    return rows


def _step(num_inputs: int, span: int, scale_inputs: int) -> int:
    """Inputs of one turn of the kernel's loop: two blocks where they divide spans and do not need four scales a row."""
    two = 2 * BLOCK_K
    return two if num_inputs % two == span % two == 0 and scale_inputs % BLOCK_K == 0 else BLOCK_K


def _has_kernel(weight: QuantizedWeight) -> bool:
    """Whether a block of inputs has one scale a row, and float8 numbers come in pairs."""
    if isinstance(weight, IntWeight):
        return True
    block_inputs = weight.block[1]
    return (block_inputs % BLOCK_K == 0 or block_inputs >= weight.num_inputs) and weight.num_inputs % 2 == 0


def _device(weight: QuantizedWeight) -> torch.device:
    return weight.tiles.device if isinstance(weight, IntWeight) else weight.values.device


def _operands(weight: QuantizedWeight) -> dict[str, Any]:
    """What both kernels must know of the weight."""
    if isinstance(weight, IntWeight):
        return {
            "weights": weight.tiles,
            "scales": weight.groups,
            "weight_stride": 0,
            "scale_stride": weight.groups.stride(1),
            "group_stride": weight.groups.stride(0),
            "KIND": f"int{weight.bits}",
            "SCALE_DTYPE": SCALE_DTYPES[weight.scale_dtype],
            "SCALE_OUTPUTS": 1,
            "SCALE_INPUTS": weight.group_size,
        }
    values = weight.values
    if values.stride(1) != 1 or values.stride(0) % 2 or values.storage_offset() % 2:
        values = values.contiguous()
    return {
        "weights": values.view(torch.int16),
        "scales": weight.scales,
        "weight_stride": values.stride(0) // 2,
        "scale_stride": weight.scales.stride(0),
        "group_stride": weight.scales.stride(1),
        "KIND": "float8" if target_kind() in WITH_FLOAT8 else "float8_bits",
        "SCALE_DTYPE": tl.float32,
        "SCALE_OUTPUTS": weight.block[0],
        "SCALE_INPUTS": weight.block[1],
    }


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
def span_sum(
    weight_rows,
    scale_rows,
    x_rows,
    first,
    end,
    group_stride,
    KIND: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SCALE_INPUTS: tl.constexpr,
    K: tl.constexpr,
    STEP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The products over first ≤ k < end, float32 [OUTPUTS, TOKENS]: blocks in rising order, STEP inputs a turn."""
    total = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    dtype: tl.constexpr = x_rows.dtype.element_ty
    for begin in range(first, end, STEP):
        for part in tl.static_range(0, STEP, BLOCK):
            start = begin + part
            # A group that is a whole number of turns is read once a turn.
            if part == 0 or SCALE_INPUTS % STEP != 0:
                scale, zero = scales_of(
                    scale_rows, start, group_stride, dtype, KIND, SCALE_DTYPE, SCALE_INPUTS, K, BLOCK
                )
            left = unpacked(weight_rows, start, scale, zero, dtype, KIND, K, BLOCK)
            k = (start + tl.arange(0, BLOCK))[:, None]
            right = tl.load(x_rows + k) if K % BLOCK == 0 else tl.load(x_rows + k, mask=k < K, other=0.0)
            total = tl.dot(left, right, total)
    return total


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


@triton.jit
def rows_of(weights, rows, weight_stride, KIND: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Where the words of each row's first block are [OUTPUTS, words]."""
    words: tl.constexpr = BLOCK // (8 if KIND == "int4" else 4 if KIND == "int8" else 2)
    if KIND == "int4" or KIND == "int8":
        # Tiles of BLOCK outputs and BLOCK inputs lie one after another, those of the same outputs first.
        row_tiles = (rows // BLOCK).to(tl.int64) * tl.cdiv(K, BLOCK)
        first = (row_tiles * BLOCK + rows % BLOCK) * words
    else:
        first = rows.to(tl.int64) * weight_stride
    return weights + first[:, None] + tl.arange(0, words)[None, :]


@triton.jit
def scales_of(
    scale_rows,
    start,
    group_stride,
    dtype: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SCALE_INPUTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(scale, zero) of the block that begins at input `start`, as `unpacked` wants them: [OUTPUTS, 1 or BLOCK]."""
    if SCALE_INPUTS >= K:
        places = scale_rows
    elif SCALE_INPUTS % BLOCK == 0:
        places = scale_rows + start // SCALE_INPUTS * group_stride
    else:
        # Groups are multiples of 32: each half of the block lies in one.
        groups = tl.minimum((start + tl.arange(0, 2) * (BLOCK // 2)) // SCALE_INPUTS, (K - 1) // SCALE_INPUTS)
        places = scale_rows[:, None] + groups[None, :] * group_stride
    if KIND == "float8" or KIND == "float8_bits":
        scale = tl.load(places)
        zero = scale
    elif tl.float32 == SCALE_DTYPE:
        scale = tl.load(places).to(tl.float32, bitcast=True)
        zero = tl.load(places + 1)
    else:
        word = tl.load(places)
        scale = word.to(tl.int16).to(SCALE_DTYPE, bitcast=True)
        zero = word >> 16
    if KIND == "int4":
        scale, zero = scale.to(dtype), shifted(zero, dtype)
    elif KIND == "int8":
        scale, zero = scale.to(dtype).to(tl.float32), zero.to(tl.float32)
    return by_input(scale, BLOCK), by_input(zero, BLOCK)


@triton.jit
def by_input(x, BLOCK: tl.constexpr):
    """[OUTPUTS] → [OUTPUTS, 1]; [OUTPUTS, 2], a number for each half of a block → [OUTPUTS, BLOCK]."""
    if len(x.shape) == 2:
        x = tl.broadcast_to(x[:, :, None], (x.shape[0], 2, BLOCK // 2)).reshape(x.shape[0], BLOCK)
    else:
        x = x[:, None]
    return x


@triton.jit
def unpacked(
    weight_rows, start, scale, zero, dtype: tl.constexpr, KIND: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    """The numbers of the block that begins at input `start` [OUTPUTS, BLOCK], rounded to `dtype` once."""
    OUTPUTS: tl.constexpr = weight_rows.shape[0]
    if KIND == "int4":
        words = tl.load(weight_rows + (start // BLOCK) * (BLOCK * BLOCK // 8))
        # [outputs, 4a + d, b, c, e]: two numbers of 16 bits are made at a time, in the halves of a word.
        halves = tl.join(
            tl.join(words & 0x000F000F, (words >> 8) & 0x000F000F),
            tl.join((words >> 4) & 0x000F000F, (words >> 12) & 0x000F000F),
        )
        numbers = tl.join(shifted(halves, dtype), shifted(halves >> 16, dtype))
        numbers = numbers.reshape(OUTPUTS, 2, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(OUTPUTS, BLOCK)
        block = (numbers - zero) * scale
    elif KIND == "int8":
        words = tl.load(weight_rows + (start // BLOCK) * (BLOCK * BLOCK // 4))
        # [outputs, 4a + c, d, b]
        values = tl.join(tl.join(words & 255, (words >> 8) & 255), tl.join((words >> 16) & 255, (words >> 24) & 255))
        values = values.reshape(OUTPUTS, 4, 4, 2, 2).permute(0, 1, 4, 2, 3).reshape(OUTPUTS, BLOCK)
        block = ((values.to(tl.float32) - zero) * scale).to(dtype)
    else:
        places = weight_rows + start // 2
        if K % BLOCK == 0:
            pairs = tl.load(places)
        else:
            pairs = tl.load(places, mask=(start // 2 + tl.arange(0, BLOCK // 2))[None, :] < K // 2, other=0)
        bytes = tl.join(pairs & 255, (pairs >> 8) & 255).reshape(OUTPUTS, BLOCK)
        block = (widened(bytes, KIND) * scale).to(dtype)
    return block


@triton.jit
def shifted(small, dtype: tl.constexpr):
    """Integers below 128 in the low halves of words → the same + 128 (bfloat16) or + 1024 (float16), exactly.

    The integer becomes the end of a mantissa whose last bit counts 1. Whatever is in the high halves is dropped.
    """
    exponent: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
    return (small | exponent).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def widened(bytes, KIND: tl.constexpr):
    """float8_e4m3fn numbers as integers → float32, exactly."""
    if KIND == "float8":
        wide = bytes.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        # The exponent's bias is 7 and float16's is 15; all ones are no number.
        halves = ((bytes & 128) << 8 | (bytes & 127) << 7).to(tl.int16).to(tl.float16, bitcast=True)
        wide = tl.where((bytes & 127) == 127, float("nan"), halves.to(tl.float32) * 256.0)
    return wide
