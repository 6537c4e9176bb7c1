"""Quantised weights in Triton: the bits of `linear` with the dequantised weight, whatever the number of tokens."""

import pytest
import torch
from torch import Tensor

from llmd_kernels import Float8Weight, IntWeight, dequantized, dispatch, linear, pack_float4_weight
from llmd_kernels.linear import triton_ops as plain
from llmd_kernels.quantized_linear import triton_ops
from llmd_kernels.quantized_linear.weights import QuantizedWeight
from tests.kernels.proof.inputs import randn
from tests.kernels.proof.interpreter import interpreted
from tests.kernels.proof.operations.quantized_linear import float4_weight, float8_weight, int_weight, weights

WEIGHTS = [pytest.param(weight, id=name) for name, weight in weights()]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_are_those_of_the_dequantised_weight(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    x, bias = randn(70, weight.num_inputs, dtype=dtype), randn(weight.num_outputs, dtype=dtype, seed=3)
    rows, x_in_order = dequantized(weight, dtype), x
    if isinstance(weight, IntWeight) and weight.input_order is not None:
        rows, x_in_order = rows[:, weight.input_order], x[:, weight.input_order]
    with interpreted():
        expected = plain.linear(x_in_order, rows, bias)
        for num_tokens in (1, 70):
            y = triton_ops.quantized_linear(x[:num_tokens], weight, bias)
            assert torch.equal(y, expected[:num_tokens])


@pytest.mark.parametrize("weight", WEIGHTS)
def test_many_tokens_take_another_way_to_the_same_bits(
    weight: QuantizedWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = randn(66, weight.num_inputs, dtype=torch.bfloat16)
    with interpreted():
        expected = triton_ops.quantized_linear(x, weight)
        monkeypatch.setattr(triton_ops, "MAX_TOKENS", 65)
        assert torch.equal(triton_ops.quantized_linear(x, weight), expected)


@pytest.mark.parametrize("kind", ["float8", "float8_bits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_float8_number_is_converted_rightly(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the hardware, where it can, and bit by bit: denormals, both zeros and both NaN too."""
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128)
    weight = Float8Weight(values, torch.tensor([[0.37]]), (2, 128))
    operands = triton_ops.operands
    monkeypatch.setattr(triton_ops, "operands", lambda weight: operands(weight) | {"KIND": kind})
    with interpreted():
        rows = triton_ops.numbers(weight, dtype)
    torch.testing.assert_close(rows, dequantized(weight, dtype), rtol=0, atol=0, equal_nan=True)
    assert rows.isnan().sum() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_float4_number_is_converted_rightly(dtype: torch.dtype) -> None:
    """With every exponent; 255 is no number."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(256, 2)
    exponents = torch.arange(256, dtype=torch.int32).to(torch.uint8)[:, None]
    weight = pack_float4_weight(codes, exponents)
    with interpreted():
        rows = triton_ops.numbers(weight, dtype)
    torch.testing.assert_close(rows, dequantized(weight, dtype), rtol=0, atol=0, equal_nan=True)
    assert rows[255].isnan().all()
    signs = [1.0] * 8 + [-1.0] * 8
    expected = torch.tensor([sign * each for sign, each in zip(signs, [0, 0.5, 1, 1.5, 2, 3, 4, 6] * 2, strict=True)])
    exact = {torch.bfloat16: range(253), torch.float16: range(104, 141)}[dtype]
    for exponent in exact:
        assert torch.equal(rows[exponent, :16].double(), expected.double() * 2.0 ** (exponent - 127)), exponent


@pytest.mark.parametrize("shape", [(4, 2), (4, 1), (3, 3)])
def test_exponents_that_do_not_fit_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not go with exponents"):
        pack_float4_weight(torch.zeros(4, 96, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("weight", [int_weight(40, 64, bits=4), float8_weight(40, 64, (1, 64)), float4_weight(40, 64)])
def test_linear_hands_quantised_weights_to_the_kernel(weight: QuantizedWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"cpu"})
    x = randn(2, 64, dtype=torch.bfloat16)
    with interpreted() as launches:
        y = linear(x, weight)
    assert [launch.kernel for launch in launches] == ["quantized_linear_kernel"]
    assert isinstance(y, Tensor)
    with interpreted():
        assert torch.equal(y, plain.linear(x, dequantized(weight, torch.bfloat16)))
