"""The proof of `quantized_linear` in Triton."""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmd_kernels.quantized_linear import cost, reference, triton_ops
from llmd_kernels.quantized_linear.weights import (
    Bits,
    Float4Weight,
    Float8Weight,
    IntWeight,
    QuantizedWeight,
    pack_float4_weight,
    pack_int_weight,
)
from tests.kernels.proof.checks import Case, Configuration, Proof, Rows
from tests.kernels.proof.compiler import MATRIX_OF_ONE_DEPTH
from tests.kernels.proof.inputs import apart, dtype_name, meta, randn

# (inputs, outputs) of Llama-3.1-8B's fused qkv, output, gate and up, down.
SHIPPED = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))


def int_weight(
    num_outputs: int,
    num_inputs: int,
    *,
    bits: Bits,
    num_groups: int = 1,
    has_zeros: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    is_ordered: bool = False,
) -> IntWeight:
    generator = torch.Generator().manual_seed(1)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, dtype=torch.uint8, generator=generator)

    scales = (randn(num_outputs, num_groups, seed=2).abs() + 0.5) / 2**bits / num_inputs**0.5
    return pack_int_weight(
        integers(2**bits, num_outputs, num_inputs),
        scales.to(scale_dtype),
        integers(2**bits, num_outputs, num_groups) if has_zeros else None,
        bits=bits,
        input_order=torch.randperm(num_inputs, generator=generator) if is_ordered else None,
    )


def float8_weight(num_outputs: int, num_inputs: int, block: tuple[int, int]) -> Float8Weight:
    values = (randn(num_outputs, num_inputs, seed=1) * 50).to(torch.float8_e4m3fn)
    num_blocks = [-(-size // step) for size, step in zip(values.shape, block, strict=True)]
    scales = (randn(*num_blocks, seed=2).abs() + 0.5) / 50 / num_inputs**0.5
    return Float8Weight(values, scales, block)


def float4_weight(num_outputs: int, num_inputs: int) -> Float4Weight:
    """All codes; exponents of weights, and of tiny ones."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(16, (num_outputs, num_inputs), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(115, 125, (num_outputs, num_inputs // 32), dtype=torch.uint8, generator=generator)
    exponents[3::7, 0] = 104
    return pack_float4_weight(codes, exponents)


def weights() -> Iterator[tuple[str, QuantizedWeight]]:
    """Every kind, group and scale; more than one tile of outputs, blocks that are cut off."""
    yield "int4, groups of 32", int_weight(70, 96, bits=4, num_groups=3, scale_dtype=torch.float16)
    yield "int4, groups of 64", int_weight(40, 256, bits=4, num_groups=4, scale_dtype=torch.float32)
    yield "int4, groups of 96", int_weight(33, 192, bits=4, num_groups=2, has_zeros=False)
    yield "int4, groups of 128 in an order", int_weight(65, 256, bits=4, num_groups=2, is_ordered=True)
    yield "int4, one group", int_weight(130, 100, bits=4)
    yield "int4, spans", int_weight(40, 1024, bits=4, num_groups=8)
    yield "int8, groups of 32", int_weight(33, 160, bits=8, num_groups=5)
    yield "int8, groups of 128", int_weight(70, 256, bits=8, num_groups=2, scale_dtype=torch.float16)
    yield "int8, one group", int_weight(20, 1100, bits=8, has_zeros=False, scale_dtype=torch.float32)
    yield "float4", float4_weight(70, 96)
    yield "float4, spans", float4_weight(40, 1088)
    yield "float8, one scale", float8_weight(70, 192, (70, 192))
    yield "float8, a scale a row", float8_weight(70, 130, (1, 130))
    yield "float8, blocks of 128×128", float8_weight(140, 300, (128, 128))
    yield "float8, odd blocks", float8_weight(20, 99, (7, 33))


def case(name: str, weight: QuantizedWeight, num_tokens: int, dtype: torch.dtype, *, outputs: bool = True) -> Case:
    return Case(
        f"{dtype_name(dtype)} {num_tokens} tokens, {name}",
        {
            "x": randn(num_tokens, weight.num_inputs, dtype=dtype),
            "weight": weight,
            "bias": randn(weight.num_outputs, dtype=dtype, seed=3) if num_tokens % 2 else None,
        },
        outputs=["y"] if outputs else [],
    )


def cases() -> Iterator[Case]:
    for place, (name, weight) in enumerate(weights()):
        yield case(name, weight, 3, torch.bfloat16)
        yield case(name, weight, (1, 17, 66)[place % 3], torch.float16)
    small = int_weight(33, 64, bits=4)
    yield case("no rows", small, 0, torch.bfloat16, outputs=False)
    yield case("dequantised once", small, triton_ops.MAX_TOKENS + 1, torch.bfloat16)
    x = apart(randn(5, 192).bfloat16())
    yield Case("rows apart, int8", {"x": x, "weight": int_weight(40, 192, bits=8), "bias": None})
    narrow = float8_weight(40, 192, (128, 128))
    wide = Float8Weight(apart(narrow.values), narrow.scales, narrow.block)
    yield Case("rows apart, float8", {"x": x, "weight": wide, "bias": None})
    grouped = int_weight(640, 512, bits=4, num_groups=4)
    yield traffic("int4", grouped, grouped.groups.nbytes, bits=4)
    small = float4_weight(640, 512)
    yield traffic("float4", small, small.exponents.nbytes, bits=4)
    blocked = float8_weight(640, 512, (128, 128))
    yield traffic("float8", blocked, blocked.scales.nbytes, bits=8)


def traffic(name: str, weight: QuantizedWeight, scale_bytes: int, *, bits: int) -> Case:
    num_inputs, num_outputs = weight.num_inputs, weight.num_outputs
    return Case(
        f"{name} is read once",
        {"x": randn(3, num_inputs).bfloat16(), "weight": weight, "bias": None},
        outputs=["y"],
        bytes_moved=cost.bytes_moved(3, num_inputs, num_outputs, bits=bits, scale_bytes=scale_bytes, itemsize=2),
        # All rows of a block of float8 have one scale.
        shared_inputs=["x"] if bits == 4 else ["x", "scales"],
    )


def rows(name: str, weight: QuantizedWeight) -> Rows:
    """More rows than one program takes, so that some of the runs split K and some do not."""
    x, bias = randn(70, weight.num_inputs).bfloat16(), randn(weight.num_outputs, seed=3).bfloat16()

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        return (triton_ops.quantized_linear(x[ids], weight, bias),)

    return Rows(name, len(x), run)


def meta_int_weight(num_outputs: int, num_inputs: int, *, bits: Bits, group_size: int) -> IntWeight:
    tiles = meta(-(-num_outputs // 64), num_inputs // 64, 64, 2 * bits, dtype=torch.int32)
    groups = meta(num_inputs // group_size, num_outputs, 1, dtype=torch.int32)
    return IntWeight(tiles, groups, torch.bfloat16, None, bits, group_size, num_outputs, num_inputs)


def meta_float8_weight(num_outputs: int, num_inputs: int, block: tuple[int, int]) -> Float8Weight:
    scales = meta(-(-num_outputs // block[0]), -(-num_inputs // block[1]), dtype=torch.float32)
    return Float8Weight(meta(num_outputs, num_inputs, dtype=torch.float8_e4m3fn), scales, block)


def meta_float4_weight(num_outputs: int, num_inputs: int) -> Float4Weight:
    tiles = meta(-(-num_outputs // 64), -(-num_inputs // 64), 64, 8, dtype=torch.int32)
    return Float4Weight(tiles, meta(num_inputs // 32, num_outputs, dtype=torch.uint8), num_outputs, num_inputs)


def shipped_weights(num_inputs: int, num_outputs: int) -> Iterator[tuple[str, QuantizedWeight, float]]:
    """(name, weight, the least part of wide loads). A scale and its zero are 4 bytes, so they are never wide."""
    for group_size, vector_share in ((128, 0.85), (64, 0.75), (32, 0.6), (num_inputs, 0.85)):
        weight = meta_int_weight(num_outputs, num_inputs, bits=4, group_size=group_size)
        yield f"int4 by {group_size}", weight, vector_share
    for group_size in (128, num_inputs):
        weight = meta_int_weight(num_outputs, num_inputs, bits=8, group_size=group_size)
        yield f"int8 by {group_size}", weight, 0.85
    # An exponent is a byte, one for 16 bytes of codes.
    yield "float4", meta_float4_weight(num_outputs, num_inputs), 0.75
    # For Hopper the compiler takes 8 bytes a thread of what it widens from 8 to 16 bits in registers.
    yield "float8 by row", meta_float8_weight(num_outputs, num_inputs, (1, num_inputs)), 0.25
    yield "float8 by 128×128", meta_float8_weight(num_outputs, num_inputs, (128, 128)), 0.25


def configurations() -> Iterator[Configuration]:
    for num_inputs, num_outputs in SHIPPED:
        for name, weight, vector_share in shipped_weights(num_inputs, num_outputs):
            for num_tokens in (16, 32, 64, 128):
                for dtype in (torch.bfloat16, torch.float16):

                    def call(
                        weight: QuantizedWeight = weight, num_tokens: int = num_tokens, dtype: torch.dtype = dtype
                    ) -> None:
                        triton_ops.quantized_linear(meta(num_tokens, weight.num_inputs, dtype=dtype), weight)

                    yield Configuration(
                        f"{dtype_name(dtype)} {num_tokens}×{num_inputs} → {num_outputs}, {name}",
                        call,
                        vector_share=vector_share,
                        matrix=MATRIX_OF_ONE_DEPTH,
                    )

            def dequantize(weight: QuantizedWeight = weight) -> None:
                triton_ops.numbers(weight, torch.bfloat16)

            yield Configuration(f"{num_inputs} → {num_outputs}, {name}, dequantised", dequantize, vector_share=0.0)


PROOF = Proof(
    triton_ops.quantized_linear,
    reference.quantized_linear,
    list(cases()),
    [
        rows("int4, 192 → 70", int_weight(70, 192, bits=4, num_groups=6)),
        rows("int8, 1100 → 40", int_weight(40, 1100, bits=8)),
        rows("float8, 1100 → 40", float8_weight(40, 1100, (128, 128))),
        rows("float4, 1088 → 40", float4_weight(40, 1088)),
    ],
    list(configurations()),
)
