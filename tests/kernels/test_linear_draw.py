"""`linear_draw` gives the token that `linear`, `scale_logits` and `sample_on_device` give, and draws as it should.

Proof of the kernel: tests/kernels/proof/operations/linear_draw.py.
"""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

pytest.importorskip("triton")

from llmd_kernels import dispatch, linear, linear_draw, sample_on_device, scale_logits
from llmd_kernels.linear_draw import triton_ops
from llmd_kernels.sample import RowSampling
from tests.kernels.proof.inputs import randn
from tests.kernels.proof.interpreter import interpreted
from tests.kernels.proof.sampling import on_device


def rows_of(num_rows: int) -> list[RowSampling]:
    temperatures = (0.0, 0.5, 1.0, 2.5)
    return [
        RowSampling(seed=r * 0x1234567890ABCDEF % 2**64, choice=r % 2, temperature=temperatures[r % 4])
        for r in range(num_rows)
    ]


def apart(x: Tensor, weight: Tensor, rows: list[RowSampling], divisor: float, soft_cap: float | None) -> Tensor:
    """One operation after another."""
    logits = scale_logits(linear(x, weight), divisor=divisor, soft_cap=soft_cap)
    return sample_on_device(logits, on_device(rows, [([0], [0] * (r % 5)) for r in range(len(rows))]))


def fused(x: Tensor, weight: Tensor, rows: list[RowSampling], divisor: float, soft_cap: float | None) -> Tensor:
    sampling = on_device(rows, [([0], [0] * (r % 5)) for r in range(len(rows))])
    return linear_draw(
        x,
        weight,
        sampling.temperatures,
        seeds=sampling.seeds,
        choices=sampling.choices,
        positions=sampling.positions,
        divisor=divisor,
        soft_cap=soft_cap,
    )


@pytest.mark.parametrize(
    ("num_rows", "hidden_size", "num_tokens", "dtype", "divisor", "soft_cap"),
    [
        (1, 64, 200, torch.bfloat16, 1.0, None),
        (6, 1100, 130, torch.bfloat16, 1.0, None),
        (70, 40, 100, torch.float16, 1.0, None),
        (5, 96, 150, torch.bfloat16, 0.3, 2.0),
        (5, 96, 150, torch.float32, 0.3, None),
    ],
)
def test_the_same_tokens_as_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
    num_rows: int,
    hidden_size: int,
    num_tokens: int,
    dtype: torch.dtype,
    divisor: float,
    soft_cap: float | None,
) -> None:
    """Logits so small that rounding makes many of them equal."""
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"cpu", "cuda"})
    x = (randn(num_rows, hidden_size) * 3).to(dtype)
    weight = (randn(num_tokens, hidden_size, seed=1) / hidden_size**0.5).to(dtype)
    rows = rows_of(num_rows)
    with interpreted(shuffle=1) as launches:
        together = fused(x, weight, rows, divisor, soft_cap)
        kernels = [launch.kernel for launch in launches]
        expected = apart(x, weight, rows, divisor, soft_cap)
    assert kernels == ["linear_draw_kernel", "pick_kernel"]
    assert together.tolist() == expected.tolist()


def test_on_a_cpu_too() -> None:
    x, weight = randn(6, 32), randn(50, 32, seed=1)
    assert torch.equal(fused(x, weight, rows_of(6), 2.0, 3.0), apart(x, weight, rows_of(6), 2.0, 3.0))


def test_draws_follow_the_exact_probabilities() -> None:
    """One tile of rows many times over, in the interpreter."""
    num_draws, num_tokens = 1024, 10
    x, weight = randn(1, 16).bfloat16(), randn(num_tokens, 16, seed=1).bfloat16()
    r = torch.arange(num_draws)
    with interpreted():
        drawn = triton_ops.linear_draw(
            x.expand(num_draws, -1).contiguous(),
            weight,
            torch.full((num_draws,), 2.0),
            seeds=r * 0x1E3779B97F4A7C15,
            choices=(r % 3).int(),
            positions=(r % 7).int(),
        )
    logits = (x.double() @ weight.double().T).bfloat16().double()[0]
    counts = Counter(drawn.tolist())
    expected = torch.softmax(logits / 2, dim=0) * num_draws
    assert chisquare([counts[i] for i in range(num_tokens)], expected.tolist()).pvalue > 1e-3
