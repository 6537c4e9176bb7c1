"""Quantised weights: packing loses nothing, the numbers are those of the definition, `linear` takes them."""

import pytest
import torch
from torch import Tensor

from llmd_kernels import Float8Weight, IntWeight, dequantized, linear, pack_int_weight
from llmd_kernels.quantized_linear import reference
from llmd_kernels.quantized_linear.weights import Bits, integers

SHAPES = [(1, 32), (3, 96), (64, 64), (70, 192), (130, 256)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_values(num_outputs: int, num_inputs: int, bits: Bits) -> Tensor:
    return torch.randint(2**bits, (num_outputs, num_inputs), dtype=torch.uint8, generator=generator())


def random_scales(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator(1)) / 100 + 1e-3


def int_weight(
    num_outputs: int,
    num_inputs: int,
    *,
    bits: Bits,
    num_groups: int = 1,
    has_zeros: bool = False,
    ordered: bool = False,
) -> IntWeight:
    zeros = torch.randint(2**bits, (num_outputs, num_groups), generator=generator(2)) if has_zeros else None
    return pack_int_weight(
        random_values(num_outputs, num_inputs, bits),
        random_scales(num_outputs, num_groups),
        zeros,
        bits=bits,
        input_order=torch.randperm(num_inputs, generator=generator(3)) if ordered else None,
    )


def float8_weight(num_outputs: int, num_inputs: int, block: tuple[int, int]) -> Float8Weight:
    values = torch.randn(num_outputs, num_inputs, generator=generator()).mul(50).to(torch.float8_e4m3fn)
    return Float8Weight(values, random_scales(-(-num_outputs // block[0]), -(-num_inputs // block[1])), block)


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_keeps_every_integer(num_outputs: int, num_inputs: int, bits: Bits) -> None:
    values = random_values(num_outputs, num_inputs, bits)
    packed = pack_int_weight(values, random_scales(num_outputs, 1), None, bits=bits)
    assert torch.equal(integers(packed), values)
    num_places = -(-num_outputs // 64) * -(-num_inputs // 64) * 64 * 64
    assert packed.tiles.nbytes == num_places * bits // 8


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integers_stand_for_the_numbers_of_the_definition(
    bits: Bits, num_groups: int, has_zeros: bool, dtype: torch.dtype
) -> None:
    num_outputs, num_inputs = 5, 192
    values, scales = random_values(num_outputs, num_inputs, bits), random_scales(num_outputs, num_groups).to(dtype)
    zeros = torch.randint(2**bits, (num_outputs, num_groups), generator=generator(2)) if has_zeros else None
    weight = pack_int_weight(values, scales, zeros, bits=bits)
    expected = torch.empty(num_outputs, num_inputs, dtype=torch.float64)
    for n in range(num_outputs):
        for k in range(num_inputs):
            group = k // (num_inputs // num_groups)
            zero = 2 ** (bits - 1) if zeros is None else int(zeros[n, group])
            expected[n, k] = scales[n, group].double() * (int(values[n, k]) - zero)
    assert torch.equal(dequantized(weight, dtype), expected.to(dtype))


def test_ordered_inputs_come_back_to_their_places() -> None:
    values, scales = random_values(3, 64, 4), random_scales(3, 2)
    order = torch.randperm(64, generator=generator(3))
    plain = dequantized(pack_int_weight(values, scales, None, bits=4), torch.float32)
    ordered = dequantized(pack_int_weight(values, scales, None, bits=4, input_order=order), torch.float32)
    assert torch.equal(ordered[:, order], plain)


@pytest.mark.parametrize("block", [(70, 300), (1, 300), (128, 128), (32, 64)])
def test_float8_stands_for_the_numbers_of_the_definition(block: tuple[int, int]) -> None:
    weight = float8_weight(70, 300, block)
    result = dequantized(weight, torch.bfloat16)
    for n, k in ((0, 0), (69, 299), (33, 127), (40, 128), (64, 256)):
        exact = weight.scales[n // block[0], k // block[1]] * weight.values[n, k].float()
        assert result[n, k] == exact.bfloat16()


@pytest.mark.parametrize(
    "weight",
    [
        int_weight(70, 192, bits=4, num_groups=6, has_zeros=True, ordered=True),
        int_weight(70, 192, bits=8, num_groups=3),
        int_weight(33, 100, bits=8),
        float8_weight(70, 300, (128, 128)),
        float8_weight(70, 300, (70, 300)),
    ],
    ids=lambda weight: type(weight).__name__,
)
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_linear_takes_quantised_weights(weight: IntWeight | Float8Weight, num_tokens: int) -> None:
    x = torch.randn(num_tokens, weight.num_inputs, generator=generator(4))
    bias = torch.randn(weight.num_outputs, generator=generator(5))
    y = linear(x, weight, bias)
    expected = reference.quantized_linear(x.double(), weight, bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-5)


def test_what_does_not_fit_is_refused() -> None:
    values = random_values(4, 96, 4)
    with pytest.raises(ValueError, match="96 inputs in 5 groups"):
        pack_int_weight(values, random_scales(4, 5), None, bits=4)
    with pytest.raises(ValueError, match="a multiple of 32"):
        pack_int_weight(values, random_scales(4, 6), None, bits=4)
    with pytest.raises(ValueError, match=r"must be \(4, 3\)"):
        pack_int_weight(values, random_scales(4, 3), random_scales(4, 1), bits=4)
    with pytest.raises(ValueError, match="zeros must lie between 0 and 16, not between 17 and 17"):
        pack_int_weight(values, random_scales(4, 1), torch.full((4, 1), 17), bits=4)
    with pytest.raises(TypeError, match="scales must be float16, bfloat16"):
        pack_int_weight(values, random_scales(4, 1).double(), None, bits=4)
    with pytest.raises(ValueError, match="input_order must be"):
        pack_int_weight(values, random_scales(4, 3), None, bits=4, input_order=torch.arange(64))
    with pytest.raises(ValueError, match=r"\(2, 3\) scales, not \(2, 2\)"):
        Float8Weight(torch.zeros(130, 300).to(torch.float8_e4m3fn), random_scales(2, 2), (128, 128))
    with pytest.raises(TypeError, match="float8_e4m3fn with float32 scales"):
        Float8Weight(torch.zeros(1, 1), random_scales(1, 1), (1, 1))
