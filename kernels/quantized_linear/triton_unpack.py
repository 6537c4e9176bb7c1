"""Device code that makes 16-bit numbers of packed weights, in registers, and what it must know of a weight.

Each number is rounded once, as `dequantized` rounds it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from llmd_kernels.kinds import WITH_FLOAT8
from llmd_kernels.linear.triton_ops import BLOCK_K
from llmd_kernels.quantized_linear.weights import FLOAT4_GROUP, Float4Weight, Float8Weight, IntWeight, QuantizedWeight
from llmd_kernels.target import target_kind

SCALE_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def has_kernel(weight: QuantizedWeight) -> bool:
    """Whether a block of inputs has one scale a row, and float8 numbers come in pairs."""
    if not isinstance(weight, Float8Weight):
        return True
    block_inputs = weight.block[1]
    return (block_inputs % BLOCK_K == 0 or block_inputs >= weight.num_inputs) and weight.num_inputs % 2 == 0


def device_of(weight: QuantizedWeight) -> torch.device:
    """Where it lies."""
    return weight.values.device if isinstance(weight, Float8Weight) else weight.tiles.device


def operands(weight: QuantizedWeight) -> dict[str, Any]:
    """What kernels must know of the weight."""
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
    if isinstance(weight, Float4Weight):
        return {
            "weights": weight.tiles,
            "scales": weight.exponents,
            "weight_stride": 0,
            "scale_stride": weight.exponents.stride(1),
            "group_stride": weight.exponents.stride(0),
            "KIND": "float4",
            "SCALE_DTYPE": tl.float32,
            "SCALE_OUTPUTS": 1,
            "SCALE_INPUTS": FLOAT4_GROUP,
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


def step(num_inputs: int, span: int, scale_inputs: int) -> int:
    """Inputs of one turn of the kernel's loop: two blocks where they divide spans and do not need four scales a row."""
    two = 2 * BLOCK_K
    return two if num_inputs % two == span % two == 0 and scale_inputs % BLOCK_K == 0 else BLOCK_K


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
def rows_of(weights, rows, weight_stride, KIND: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Where the words of each row's first block are [OUTPUTS, words]."""
    words: tl.constexpr = BLOCK // (8 if KIND == "int4" or KIND == "float4" else 4 if KIND == "int8" else 2)
    if KIND == "int4" or KIND == "float4" or KIND == "int8":
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
    elif KIND == "float4":
        exponent = tl.load(places).to(tl.int32)
        # 2^-127 is half of the smallest normal number, and NaN infinity with a mantissa.
        special = ((exponent == 0) | (exponent == 255)).to(tl.int32)
        scale = (exponent << 23 | special << 22).to(tl.float32, bitcast=True).to(dtype)
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
    if KIND == "int4" or KIND == "float4":
        words = tl.load(weight_rows + (start // BLOCK) * (BLOCK * BLOCK // 8))
        # [outputs, 4a + d, b, c, e]: two numbers of 16 bits are made at a time, in the halves of a word.
        halves = tl.join(
            tl.join(words & 0x000F000F, (words >> 8) & 0x000F000F),
            tl.join((words >> 4) & 0x000F000F, (words >> 12) & 0x000F000F),
        )
        if KIND == "int4":
            numbers = tl.join(shifted(halves, dtype), shifted(halves >> 16, dtype))
        else:
            places = float4_places(halves, dtype)
            numbers = tl.join(widened_float4(places, dtype), widened_float4(places >> 16, dtype))
        numbers = numbers.reshape(OUTPUTS, 2, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(OUTPUTS, BLOCK)
        block = (numbers - zero) * scale if KIND == "int4" else numbers * scale
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
def float4_places(codes, dtype: tl.constexpr):
    """MXFP4 codes in both halves of words → their bits at the places of `dtype`, whose exponent is then too small."""
    mantissa: tl.constexpr = 7 if dtype == tl.bfloat16 else 10
    return ((codes & 0x00080008) << 12) | ((codes & 0x00070007) << (mantissa - 1))


@triton.jit
def widened_float4(places, dtype: tl.constexpr):
    """The numbers whose `float4_places` are in the low halves of words, exactly; 0.5 from one below normal."""
    bias: tl.constexpr = 126 if dtype == tl.bfloat16 else 14
    return places.to(tl.int16).to(dtype, bitcast=True) * tl.full([], 2.0**bias, dtype)


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
