"""`sample_on_device`: PyTorch's and Triton's against the reference of `sample`; packing.

Proof of the kernels: tests/kernels/proof/operations/sample_on_device.py.
"""

import importlib
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

pytest.importorskip("triton")

from llmd_kernels import (
    RowSampling,
    SamplingBatch,
    SamplingRecords,
    dispatch,
    sample,
    sample_on_device,
)
from llmd_kernels.sample import reference, triton_adjust, triton_filters, triton_ops
from llmd_kernels.sample.host_batch import to_device
from tests.kernels.proof.inputs import randn
from tests.kernels.proof.interpreter import interpreted
from tests.kernels.proof.operations.sample_on_device import KINDS
from tests.kernels.proof.sampling import History, on_device


def random_row(chance: random.Random) -> RowSampling:
    choose = chance.choice
    return RowSampling(
        seed=chance.randrange(2**64),
        choice=choose([0, 3, 2**32 - 1]),
        temperature=choose([0.0, 0.5, 1.0, 2.0]),
        top_k=choose([0, 0, 1, 5, 290]),
        top_p=choose([1.0, 1.0, 0.3, 0.9, 0.999]),
        min_p=choose([0.0, 0.0, 0.05, 0.5]),
        repetition_penalty=choose([1.0, 1.25, 0.75]),
        presence_penalty=choose([0.0, 0.5]),
        frequency_penalty=choose([0.0, -0.5]),
        logit_bias=choose([{}, {3: 5.0, 7: -100.0}]),
        min_tokens=choose([0, 5]),
        stop_token_ids=choose([(), (1, 2)]),
        num_logprobs=choose([None, 0, 3]),
    )


def random_step(seed: int, num_rows: int, num_tokens: int) -> tuple[Tensor, list[RowSampling], list[History]]:
    """Logits, rows and (prompt, output) of each."""
    chance = random.Random(seed)
    rows = [random_row(chance) for _ in range(num_rows)]

    def some_tokens() -> list[int]:
        return chance.choices(range(num_tokens), k=chance.randrange(9))

    return randn(num_rows, num_tokens, seed=seed) * 3, rows, [(some_tokens(), some_tokens()) for _ in rows]


def batch_of(rows: list[RowSampling], histories: list[History]) -> SamplingBatch:
    return SamplingBatch(rows, [[*prompt, *output] for prompt, output in histories], [len(p) for p, _ in histories])


@pytest.mark.parametrize("seed", range(20))
def test_pytorch_equals_the_reference(seed: int) -> None:
    logits, rows, histories = random_step(seed, 10, 300)
    mask = randn(10, 300, seed=seed) < 0 if seed % 2 else None
    every_second = None if mask is None else mask | (torch.arange(10) % 2 == 0)[:, None]
    expected = reference.sample(logits, batch_of(rows, histories), mask=every_second).token_ids
    assert torch.equal(sample_on_device(logits, on_device(rows, histories, mask=mask)), expected)


def test_rows_that_fill_up_are_greedy_and_change_nothing() -> None:
    logits, rows, histories = random_step(7, 5, 300)
    expected = sample_on_device(logits, on_device(rows, histories)).tolist()
    padding = torch.tensor([[0.0, 2.0, 2.0, 1.0]] * 3).repeat(1, 75)
    filled = on_device(rows, histories, max_rows=8)
    everything = torch.cat((logits, padding))
    assert sample_on_device(everything, filled).tolist() == [*expected, 1, 1, 1]
    with interpreted(shuffle=1):
        assert triton_ops.sample_on_device(everything, filled).tolist() == [*expected, 1, 1, 1]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rows do not fit 1"):
        on_device(KINDS[:2], max_rows=1)


def test_records_know_whether_anybody_asks_for_more_than_noise() -> None:
    records = SamplingRecords(2)

    def put(column: int, **parameters: Any) -> None:
        records.put(column, RowSampling(seed=1, **parameters), prompt_len=1, place=column)

    put(0, temperature=0.5, stop_token_ids=(3,))
    assert records.asks_nothing
    put(1, top_k=2)
    assert not records.asks_nothing
    records.drop(1)
    assert records.asks_nothing
    put(0, stop_token_ids=(3,), min_tokens=2)
    assert not records.asks_nothing
    put(0)
    assert records.asks_nothing


def test_columns_begin_where_wide_loads_may() -> None:
    sampling = on_device(KINDS[:3])
    for column in (sampling.seeds, sampling.temperatures, sampling.flags, sampling.bias_starts, sampling.biases):
        assert (column.data_ptr() - sampling.seeds.data_ptr()) % 16 == 0


@settings(max_examples=6, deadline=None)
@given(
    logits=st.lists(st.integers(-8, 8).map(lambda n: n / 2), min_size=2, max_size=40),
    temperature=st.sampled_from([0.25, 1.0, 3.0]),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.015625, 1, width=32),
    min_p=st.floats(0, 1, width=32),
    seed=st.integers(0, 2**64 - 1),
    max_candidates=st.sampled_from([2, 16, 64]),
)
def test_triton_draws_what_the_reference_draws(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int, max_candidates: int
) -> None:
    """Ties everywhere; few candidates let rows be bisected that would otherwise be ranked."""
    row = RowSampling(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = [row, RowSampling(seed=seed ^ 1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)]
    scores = torch.tensor([logits, logits])
    sampling = on_device(rows)
    with pytest.MonkeyPatch.context() as patch, interpreted(shuffle=1):
        patch.setattr(triton_filters, "MAX_CANDIDATES", max_candidates)
        found = triton_ops.sample_on_device(scores, sampling)
    assert found.tolist() == reference.sample_on_device(scores, sampling).tolist()


def test_penalties_and_grammars_of_a_row_that_filters() -> None:
    logits, rows, histories = random_step(3, 8, 300)
    mask = randn(8, 300, seed=5) < 0
    sampling = on_device(rows, histories, mask=mask)
    with interpreted(shuffle=2, check_overflow=True):
        found = triton_ops.sample_on_device(logits, sampling)
    assert found.tolist() == reference.sample_on_device(logits, sampling).tolist()


def test_long_histories_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_adjust, "HISTORY", 4)
    monkeypatch.setattr(triton_adjust, "TILE", 8)
    row = RowSampling(seed=1, temperature=0, frequency_penalty=1.0, repetition_penalty=2.0)
    sampling = on_device([row], [([19, 3, 3, 3, 7], [0, 18, 18, 19, 3, 0, 18])])
    logits = torch.linspace(4, 5, 20)[None] * torch.tensor([1.0, 0.5]).repeat(10)
    logits[0, [18, 19, 0, 3]] += torch.tensor([7.0, 5.5, 4.0, 6.0])
    with interpreted(shuffle=1):
        found = triton_ops.sample_on_device(logits, sampling)
    assert found.tolist() == reference.sample_on_device(logits, sampling).tolist()


def test_draws_follow_the_exact_probabilities() -> None:
    """The definition without the row's maximum, in PyTorch; Triton's draws are the same tokens."""
    logits = randn(12, seed=3) * 2
    num_draws = 4000
    rows = [RowSampling(seed=r * 0x9E3779B97F4A7C15 % 2**64, choice=r % 3, temperature=1.5) for r in range(num_draws)]
    sampling = to_device(
        SamplingBatch(rows, [[0] * (1 + r % 7) for r in range(num_draws)], [1] * num_draws), logits.device
    )
    drawn = sample_on_device(logits.expand(num_draws, -1), sampling)
    counts = Counter(drawn.tolist())
    expected = torch.softmax(logits.double() / 1.5, dim=0) * num_draws
    assert chisquare([counts[i] for i in range(12)], expected.tolist()).pvalue > 1e-3
    some = on_device(rows[:40], [([0], [0] * (r % 7)) for r in range(40)])
    with interpreted():
        assert triton_ops.sample_on_device(logits.expand(40, -1), some).tolist() == drawn[:40].tolist()


def test_nothing_but_infinities_or_nan_gives_a_token_that_exists() -> None:
    logits = torch.tensor([[-torch.inf] * 5, [torch.nan] * 5])
    for row in (RowSampling(seed=1), RowSampling(seed=1, top_p=0.5), RowSampling(seed=1, top_k=2)):
        with interpreted():
            found = triton_ops.sample_on_device(logits, on_device([row, row]))
        assert all(0 <= token_id < 5 for token_id in found.tolist())


@pytest.fixture
def triton_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU count as a GPU's."""
    # Kernels must be defined before the interpreter takes over.
    importlib.import_module("llmd_kernels.token_logprobs.triton_ops")
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"cpu", "cuda"})


@pytest.mark.usefixtures("triton_on_cpu")
def test_the_public_sample_takes_the_same_kernels() -> None:
    logits, rows, histories = random_step(11, 6, 300)
    mask = randn(6, 300, seed=1) < 0.5
    batch = batch_of(rows, histories)
    expected = reference.sample(logits, batch, mask=mask)
    with interpreted(shuffle=1) as launches:
        found = sample(logits, batch, mask=mask)
    assert launches[0].kernel == "adjust_kernel"
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    for entry, truth in zip(found.logprobs, expected.logprobs, strict=True):
        assert (entry is None) == (truth is None)
        if entry is not None and truth is not None:
            assert (entry.token_id, entry.rank, entry.top_ids) == (truth.token_id, truth.rank, truth.top_ids)
            assert [entry.logprob, *entry.top_logprobs] == pytest.approx([truth.logprob, *truth.top_logprobs], abs=1e-5)


def test_no_rows() -> None:
    assert sample_on_device(torch.zeros(0, 10), on_device([])).shape == (0,)


def test_stop_tokens_wait_for_as_many_tokens_as_are_asked_for() -> None:
    """Also for more than 32 bits hold, which a request may ask for."""
    rows = [RowSampling(seed=0, min_tokens=n, stop_token_ids=(5,)) for n in (3, 4, 1 << 40)]
    sampling = on_device(rows, [([1], [2, 2, 2])] * 3)
    assert sampling.bias_starts.tolist() == [0, 0, 1, 2]
    assert sampling.bias_ids.tolist() == [5, 5]
    assert sampling.adjusts
