"""Quantised weights: what they hold, how integers are packed, and the numbers they stand for. Knows no product."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Bits = Literal[4, 8]

# A tile of packed integers: so many outputs and inputs lie together in memory.
TILE_OUTPUTS = 64
TILE_INPUTS = 64
# Groups of inputs that share a scale are a multiple of this, or all inputs are one group.
GROUP_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class IntWeight:
    """weight[n, k] = scale[n, k // group_size] · (q[n, k] − zero[n, k // group_size]), q of `bits` bits.

    Made by `pack_int_weight`; the README describes the layout of `tiles`.
    """

    tiles: Tensor  # int32 [output tiles, input tiles, 64, 8 (4 bits) or 16 (8 bits)]
    # int32 [num_groups, num_outputs, 1 or 2]: scale's bits and zero in one word, in two if the scale is float32.
    groups: Tensor
    scale_dtype: torch.dtype
    # int64 [num_inputs]: k counts inputs in this order, input k is x[:, input_order[k]]. None: as they come.
    input_order: Tensor | None
    bits: Bits
    group_size: int
    num_outputs: int
    num_inputs: int


@dataclass(frozen=True, slots=True)
class Float8Weight:
    """weight[n, k] = scales[n // block[0], k // block[1]] · values[n, k].

    One scale for all: block (N, K); one a row: (1, K); DeepSeek's: (128, 128). Blocks at the end may be cut off.
    """

    values: Tensor  # float8_e4m3fn [num_outputs, num_inputs]
    scales: Tensor  # float32 [ceil(num_outputs / block[0]), ceil(num_inputs / block[1])]
    block: tuple[int, int]

    def __post_init__(self) -> None:
        """Raises ValueError for scales that do not fit, TypeError for other dtypes."""
        if self.values.dtype != torch.float8_e4m3fn or self.scales.dtype != torch.float32:
            raise TypeError(
                f"a Float8Weight is float8_e4m3fn with float32 scales, not {self.values.dtype} with {self.scales.dtype}"
            )
        expected = tuple(-(-size // step) for size, step in zip(self.values.shape, self.block, strict=True))
        if tuple(self.scales.shape) != expected:
            raise ValueError(
                f"{tuple(self.values.shape)} numbers in blocks of {self.block} have {expected} scales,"
                f" not {tuple(self.scales.shape)}"
            )

    @property
    def num_outputs(self) -> int:
        return self.values.shape[0]

    @property
    def num_inputs(self) -> int:
        return self.values.shape[1]


@dataclass(frozen=True, slots=True)
class Float4Weight:
    """weight[n, k] = 2^(exponents[k // 32, n] − 127) · number[n, k]: MXFP4 (OCP Microscaling Formats 1.0).

    A number has a sign, two bits of exponent and one of mantissa. An exponent of 255 is no number. Made by
    `pack_float4_weight`.
    """

    tiles: Tensor  # int32 [output tiles, input tiles, 64, 8]: codes in the layout of an IntWeight of 4 bits
    exponents: Tensor  # uint8 [num_groups, num_outputs]
    num_outputs: int
    num_inputs: int


QuantizedWeight = IntWeight | Float8Weight | Float4Weight

# Inputs of a Float4Weight that share an exponent.
FLOAT4_GROUP = 32
FLOAT4_BIAS = 127  # of an exponent
FLOAT4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack_float4_weight(codes: Tensor, exponents: Tensor) -> Float4Weight:
    """MXFP4 as checkpoints have it → the layout that kernels read.

    codes: uint8 [N, K], one number each: 8 · sign + 2 · exponent + mantissa. exponents: uint8 [N, K / 32]. The result
    lies on the device of `codes`. Raises ValueError for shapes that disagree.
    """
    num_outputs, num_inputs = codes.shape
    if num_inputs % FLOAT4_GROUP or exponents.shape != (num_outputs, num_inputs // FLOAT4_GROUP):
        raise ValueError(f"{tuple(codes.shape)} numbers do not go with exponents {tuple(exponents.shape)}")
    return Float4Weight(_packed(codes, 4), exponents.t().contiguous(), num_outputs, num_inputs)


def pack_int_weight(
    values: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: Bits, input_order: Tensor | None = None
) -> IntWeight:
    """Integers as checkpoints mean them → the layout that kernels read.

    values: uint8 [N, K], one integer each, less than 2^bits. scales: float16, bfloat16 or float32 [N, G], one for each
    K / G inputs. zeros: whole numbers 0 … 2^bits [N, G], any dtype, or None: 2^(bits − 1). input_order: [K], see
    IntWeight (GPTQ's "act-order": the inputs sorted by their group). The result lies on the device of `values`.
    Raises ValueError for groups that are neither a multiple of 32 inputs nor all of them, for shapes that disagree and
    for other zeros; TypeError for other scales.
    """
    num_outputs, num_inputs = values.shape
    num_groups = scales.shape[1]
    group_size = num_inputs // max(num_groups, 1)
    if group_size * num_groups != num_inputs or (num_groups > 1 and group_size % GROUP_MULTIPLE):
        raise ValueError(
            f"{num_inputs} inputs in {num_groups} groups: groups must be of one size, a multiple of {GROUP_MULTIPLE}"
        )
    expected = (num_outputs, num_groups)
    if scales.shape != expected or (zeros is not None and zeros.shape != expected):
        shapes = [tuple(tensor.shape) for tensor in (scales, zeros) if tensor is not None]
        raise ValueError(f"scales and zeros must be {expected}, not {shapes}")
    if input_order is not None and input_order.shape != (num_inputs,):
        raise ValueError(f"input_order must be {(num_inputs,)}, not {tuple(input_order.shape)}")
    if zeros is None:
        zeros = torch.full(expected, 2 ** (bits - 1), device=values.device)
    elif zeros.numel() and not 0 <= int(zeros.min()) <= int(zeros.max()) <= 2**bits:
        raise ValueError(f"zeros must lie between 0 and {2**bits}, not between {zeros.min()} and {zeros.max()}")
    return IntWeight(
        tiles=_packed(values, bits),
        groups=_group_words(scales.t(), zeros.t().to(torch.int32)),
        scale_dtype=scales.dtype,
        input_order=None if input_order is None else input_order.to(torch.int64),
        bits=bits,
        group_size=group_size,
        num_outputs=num_outputs,
        num_inputs=num_inputs,
    )


def dequantized(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The numbers that a weight stands for [N, K], rounded to `dtype` once; the inputs are in x's order.

    Integers: the scale is rounded to `dtype` first, as checkpoints of that dtype have it; q − zero is exact. So is a
    power of two of MXFP4, which matters for float16 alone.
    """
    if isinstance(weight, Float8Weight):
        return _dequantized_float8(weight, dtype)
    if isinstance(weight, Float4Weight):
        return float4_numbers(integers(weight), weight.exponents.t(), dtype)
    scales, zeros = scales_and_zeros(weight)
    exact = integers(weight).to(torch.int16) - _by_input(zeros.to(torch.int16), weight)
    rows = exact.to(dtype) * _by_input(scales.to(dtype), weight)
    if weight.input_order is None:
        return rows
    return torch.empty_like(rows).index_copy_(1, weight.input_order, rows)


def integers(weight: IntWeight | Float4Weight) -> Tensor:
    """The integers or codes that were packed, uint8 [N, K], in the order of `input_order`."""
    tiles = weight.tiles.view(torch.uint8)
    if isinstance(weight, Float4Weight) or weight.bits == 4:
        packed = tiles.view(*tiles.shape[:3], 2, 4, 2, 2)
        places = torch.stack((packed & 15, packed >> 4), dim=-1)
        values = places.permute(0, 1, 2, 3, 6, 7, 4, 5)
    else:
        values = tiles.view(*tiles.shape[:3], 4, 4, 2, 2).transpose(4, 5)
    rows = values.flatten(3).transpose(1, 2).flatten(2).flatten(0, 1)
    return rows[: weight.num_outputs, : weight.num_inputs]


def scales_and_zeros(weight: IntWeight) -> tuple[Tensor, Tensor]:
    """(scales in `scale_dtype`, zeros int32), [num_groups, num_outputs] each."""
    if weight.scale_dtype == torch.float32:
        return weight.groups[..., 0].view(torch.float32), weight.groups[..., 1]
    halves = weight.groups.view(torch.int16)
    return halves[..., 0].contiguous().view(weight.scale_dtype), halves[..., 1].to(torch.int32)


def _packed(values: Tensor, bits: Bits) -> Tensor:
    """[N, K] → int32 [output tiles, input tiles, TILE_OUTPUTS, words], filled up with zeros.

    4 bits: input 32a + 16b + 8c + 2d + e of a tile is in word 4a + d at bit 16e + 8b + 4c.
    8 bits: input 16a + 8b + 2c + d is in word 4a + c at byte 2b + d.
    """
    num_outputs, num_inputs = values.shape
    padded = F.pad(values, (0, -num_inputs % TILE_INPUTS, 0, -num_outputs % TILE_OUTPUTS))
    output_tiles, input_tiles = padded.shape[0] // TILE_OUTPUTS, padded.shape[1] // TILE_INPUTS
    tiles = padded.view(output_tiles, TILE_OUTPUTS, input_tiles, TILE_INPUTS).transpose(1, 2)
    if bits == 4:
        places = tiles.unflatten(3, (2, 2, 2, 4, 2)).permute(0, 1, 2, 3, 6, 7, 4, 5)  # type: ignore[no-untyped-call]
        packed = places[..., 0] | (places[..., 1] << 4)
    else:
        packed = tiles.unflatten(3, (4, 2, 4, 2)).transpose(4, 5)  # type: ignore[no-untyped-call]
    words: Tensor = packed.flatten(3).contiguous().view(torch.int32)
    return words


def _group_words(scales: Tensor, zeros: Tensor) -> Tensor:
    """[num_groups, N] each → [num_groups, N, words]."""
    if scales.dtype == torch.float32:
        return torch.stack((scales.contiguous().view(torch.int32), zeros), dim=-1)
    if scales.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"scales must be float16, bfloat16 or float32, not {scales.dtype}")
    halves = torch.stack((scales.contiguous().view(torch.int16), zeros.to(torch.int16)), dim=-1)
    return halves.view(torch.int32)


def _by_input(groups: Tensor, weight: IntWeight) -> Tensor:
    """[num_groups, N] → [N, num_inputs]."""
    return groups.t().repeat_interleave(weight.group_size, dim=1)


def _dequantized_float8(weight: Float8Weight, dtype: torch.dtype) -> Tensor:
    num_outputs, num_inputs = weight.values.shape
    scales = weight.scales.repeat_interleave(weight.block[0], dim=0)[:num_outputs]
    scales = scales.repeat_interleave(weight.block[1], dim=1)[:, :num_inputs]
    return (weight.values.float() * scales).to(dtype)


def float4_numbers(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """What MXFP4 stands for [N, K], from codes uint8 [N, K] and exponents uint8 [N, K / 32] as `pack_float4_weight`
    takes them.

    Exact in bfloat16 and float32. float16 holds powers of two from 2^-24 to 2^15: a smaller one counts as 0 there and a
    greater one as infinity, and products are rounded.
    """
    magnitudes = torch.tensor(FLOAT4_MAGNITUDES, dtype=dtype, device=codes.device)
    numbers = magnitudes[(codes & 7).int()] * (1 - 2 * (codes >> 3).to(dtype))
    bits = exponents.to(torch.int32)
    # 2^-127 is half of the smallest normal number, and NaN infinity with a mantissa
    special = (bits == 0) | (bits == 255)
    powers = (bits << 23 | special.to(torch.int32) << 22).view(torch.float32)
    return numbers * powers.to(dtype).repeat_interleave(FLOAT4_GROUP, dim=1)
