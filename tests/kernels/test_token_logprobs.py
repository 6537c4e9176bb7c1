"""`top_tokens` and `token_logprobs`: exact order, exact ranks, logarithms of float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd_kernels import token_logprobs, top_tokens
from llmd_kernels.token_logprobs import reference
from tests.kernels.conftest import threads


@settings(max_examples=100, deadline=None)
@given(data=st.data(), num_rows=st.integers(0, 4), num_tokens=st.integers(1, 30))
def test_top_tokens_are_in_the_order_of_a_stable_sort(data: st.DataObject, num_rows: int, num_tokens: int) -> None:
    values = st.integers(-3, 3).map(float)
    flat = data.draw(st.lists(values, min_size=num_rows * num_tokens, max_size=num_rows * num_tokens))
    logits = torch.tensor(flat).view(num_rows, num_tokens)
    k = data.draw(st.integers(0, num_tokens))
    found_values, found_ids = top_tokens(logits, k)
    expected = torch.sort(logits, dim=1, descending=True, stable=True)
    assert torch.equal(found_values, expected.values[:, :k])
    assert torch.equal(found_ids, expected.indices[:, :k])


@pytest.mark.parametrize("num_rows", [0, 1, 3, 70])
@pytest.mark.parametrize("num_top", [0, 5])
def test_equals_the_reference(num_rows: int, num_top: int) -> None:
    logits = (torch.randn(num_rows, 1000, generator=torch.Generator().manual_seed(num_rows)) * 8).round(decimals=1)
    token_ids = torch.arange(num_rows) * 7
    found = token_logprobs(logits, token_ids, num_top)
    expected = reference.token_logprobs(logits, token_ids, num_top)
    assert len(found) == num_rows
    for one, truth in zip(found, expected, strict=True):
        assert (one.token_id, one.rank, one.top_ids) == (truth.token_id, truth.rank, truth.top_ids)
        assert [one.logprob, *one.top_logprobs] == pytest.approx([truth.logprob, *truth.top_logprobs], abs=1e-11)


def test_huge_and_tiny_logits() -> None:
    (entry,) = token_logprobs(torch.tensor([[3e4, -3e4, 3e4]]), torch.tensor([1]), 2)
    assert entry.logprob == pytest.approx(-6e4 - 0.6931471805599453)
    assert entry.rank == 3
    assert entry.top_ids == [0, 2]
    assert entry.top_logprobs == pytest.approx([-0.6931471805599453] * 2)


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = torch.randn(34, 40001, generator=torch.Generator().manual_seed(0)) * 4
    token_ids = torch.arange(34)
    together = token_logprobs(logits, token_ids, 3)
    with threads(2):
        alone = [token_logprobs(logits[r : r + 1], token_ids[r : r + 1], 3)[0] for r in range(34)]
        assert token_logprobs(logits[5:9], token_ids[5:9], 3) == together[5:9]
    assert alone == together
