"""linear, rms_norm, add_rms_norm and gated_mul against their references, and the same bits for any other rows."""

from collections.abc import Callable
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from llmd_kernels import add_rms_norm, gated_mul, linear, pack_weight, rms_norm
from llmd_kernels.add_rms_norm import reference as add_rms_norm_reference
from llmd_kernels.gated_mul import reference as gated_mul_reference
from llmd_kernels.linear import reference as linear_reference
from llmd_kernels.rms_norm import reference as rms_norm_reference
from tests.kernels.conftest import threads

Activation = Literal["silu", "gelu_tanh", "gelu", "clamped_silu"]
NUM_TOKENS = [0, 1, 7, 8, 63, 257]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(result: Tensor, expected: Tensor, *, tolerance: float) -> None:
    """`result` in float32 against `expected` in float64."""
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(num_tokens: int, has_bias: bool) -> None:
    x, weight = randn(num_tokens, 65), randn(33, 65, seed=1)
    bias = randn(33, seed=2) if has_bias else None
    expected = linear_reference.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_near(linear(x, weight, bias), expected, tolerance=2e-5)
    assert_near(linear(x, pack_weight(weight), bias), expected, tolerance=2e-5)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_norms(num_tokens: int, weight_offset: float) -> None:
    x, residual, weight = randn(num_tokens, 100), randn(num_tokens, 100, seed=1) * 10, randn(100, seed=2)
    expected = rms_norm_reference.rms_norm(x.double(), weight.double(), 1e-5, weight_offset=weight_offset)
    assert_near(rms_norm(x, weight, 1e-5, weight_offset=weight_offset), expected, tolerance=2e-6)
    before = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-5, weight_offset=weight_offset)
    expected_normed, expected_total = add_rms_norm_reference.add_rms_norm(
        x.double(), residual.double(), weight.double(), 1e-5, weight_offset=weight_offset
    )
    assert_near(normed, expected_normed, tolerance=2e-6)
    assert_near(total, expected_total, tolerance=2e-6)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_a_norm_of_bfloat16_is_computed_wide_and_rounded_once() -> None:
    x, weight = (randn(9, 576) * 100).bfloat16(), randn(576, seed=1).bfloat16()
    wide = rms_norm(x.float(), weight.float(), 1e-5, weight_offset=1.0)
    assert torch.equal(rms_norm(x, weight, 1e-5, weight_offset=1.0), wide.bfloat16())


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("activation", get_args(Activation))
def test_gated_mul(num_tokens: int, activation: Activation) -> None:
    gate_up = randn(num_tokens, 2 * 45) * 4
    expected = gated_mul_reference.gated_mul(gate_up.double(), activation)
    assert_near(gated_mul(gate_up, activation), expected, tolerance=2e-6)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_gated_mul_far_out(activation: Activation) -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    result = gated_mul(torch.cat([gate, torch.ones_like(gate)], dim=1), activation)
    # gpt-oss's is (up + 1) times a gate of 7 at most.
    expected = 2 * gate.clamp(0, 7) if activation == "clamped_silu" else gate.clamp(min=0)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


# Real sizes of SmolLM2-135M: fused qkv, output, gate and up, down, head; and a vocabulary of odd size.
LINEARS = [(576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152), (64, 50257)]


def operation(name: str) -> tuple[int, Callable[[Tensor], Tensor]]:
    """(width of a row, the operation as a function of the rows alone)."""
    if name.startswith("linear"):
        num_inputs, num_outputs = (int(n) for n in name.split()[-2:])
        weight, bias = randn(num_outputs, num_inputs, seed=1), randn(num_outputs, seed=2)
        if name.startswith("linear packed"):
            weight = pack_weight(weight)
        return num_inputs, lambda x: linear(x, weight, bias)
    if name == "rms_norm":
        norm_weight = randn(576, seed=1)
        return 576, lambda x: rms_norm(x, norm_weight, 1e-5)
    activation: Activation = name.split()[1]  # type: ignore[assignment]
    return 2 * 300, lambda x: gated_mul(x, activation)


OPERATIONS = [
    *(f"linear {k} {n}" for k, n in LINEARS),
    *(f"linear packed {k} {n}" for k, n in LINEARS),
    "rms_norm",
    *(f"gated_mul {activation}" for activation in get_args(Activation)),
]


@pytest.mark.parametrize("name", OPERATIONS)
def test_bits_of_a_row_do_not_depend_on_the_others(name: str) -> None:
    width, compute = operation(name)
    num_rows = 41 if "49152" in name or "50257" in name else 263
    x = randn(num_rows, width) * 3
    whole = compute(x)
    for size in (1, 2, 3, 5, 8, 11, 16, 31, 64, 130):
        for start in (0, 1, 6, 17):
            part = slice(start, start + size)
            assert torch.equal(compute(x[part]), whole[part]), (start, size)
    turned = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1))
    assert torch.equal(compute(x[turned]), whole[turned])
    # Of an odd number of rows each of two threads takes a half, so one row is computed by both.
    with threads(2):
        for size in (7, 119, 151, 181, 221, 237, 251, 263):
            assert torch.equal(compute(x[:size]), whole[:size]), size
