"""`sample` against its reference, against exact probabilities and against values worked out by hand."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from llmd_kernels import RowSampling, SamplingBatch, sample
from llmd_kernels.sample import reference
from llmd_kernels.sample.filters import survivors
from llmd_kernels.sample.noise import gumbel, gumbel_of_all, philox
from tests.kernels.conftest import threads


def batch(samplings: list[RowSampling], histories: Sequence[tuple[list[int], ...]] | None = None) -> SamplingBatch:
    """`histories`: (prompt, output so far) of each row."""
    histories = histories or [([0], [])] * len(samplings)
    return SamplingBatch(
        sampling=samplings,
        token_ids=[prompt + output for prompt, output in histories],
        num_prompt_tokens=[len(prompt) for prompt, _ in histories],
    )


def greedy(logits: list[float], history: tuple[list[int], list[int]] = ([], []), **options: Any) -> int:
    """The token of one row at temperature 0."""
    row = RowSampling(seed=0, temperature=0, **options)
    return int(sample(torch.tensor([logits]), batch([row], [history])).token_ids)


def draws(logits: Tensor, num_draws: int, **options: Any) -> list[int]:
    """Tokens drawn from the same logits [V] with other seeds and positions."""
    samplings = [RowSampling(seed=r * 0x9E3779B97F4A7C15 % 2**64, choice=r % 3, **options) for r in range(num_draws)]
    histories = [([0], [0] * (r % 7)) for r in range(num_draws)]
    return sample(logits.expand(num_draws, -1), batch(samplings, histories)).token_ids.tolist()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0x00000000, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_gives_the_known_answers_of_random123(word: int, expected: list[int]) -> None:
    one = torch.tensor([[word]])
    assert [int(w) for w in philox((one, one, one, one), (one, one))] == expected
    assert list(reference.philox((word,) * 4, (word,) * 2)) == expected


def test_philox_of_pi() -> None:
    """The third known answer of Random123: counter and key are digits of pi."""
    counter, key = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    expected = (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    c0, c1, c2, c3 = (torch.tensor([[c]]) for c in counter)
    k0, k1 = (torch.tensor([[k]]) for k in key)
    assert tuple(int(w) for w in philox((c0, c1, c2, c3), (k0, k1))) == expected
    assert reference.philox(counter, key) == expected


def test_the_noise_of_a_token_is_the_same_among_all_and_alone() -> None:
    seeds, positions, choices = torch.tensor([5, -3]), torch.tensor([0, 9]), torch.tensor([2, 0])
    everything = gumbel_of_all(seeds, positions, choices, 1003)
    ids = torch.tensor([[0, 7, 1002], [3, 500, 1]])
    assert torch.equal(gumbel(seeds, positions, choices, ids), everything.gather(1, ids))
    expected = [reference.gumbel(5, 0, 2, 7), reference.gumbel(2**64 - 3, 9, 0, 500)]
    torch.testing.assert_close(everything[[0, 1], [7, 500]].tolist(), expected, rtol=1e-6, atol=1e-6)


FILTERS: dict[str, dict[str, Any]] = {
    "everything off": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.4, "top_k": 12, "top_p": 0.85, "min_p": 0.05},
}


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS.keys())
def test_draws_follow_the_exact_probabilities(options: dict[str, Any]) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    scaled = reference.survivors(logits.tolist(), RowSampling(seed=0, **options))
    total = math.fsum(math.exp(s) for s in scaled.values())
    num_draws = 6000
    counts = Counter(draws(logits, num_draws, **options))
    assert set(counts) <= set(scaled)
    # Rare tokens share a bin, as the test wants a few expected in each.
    expected = {i: num_draws * math.exp(s) / total for i, s in scaled.items()}
    common = [i for i in expected if expected[i] >= 5]
    observed = [counts[i] for i in common] + [num_draws - sum(counts[i] for i in common)]
    wanted = [expected[i] for i in common] + [num_draws - sum(expected[i] for i in common)]
    if wanted[-1] < 5:
        observed, wanted = [*observed[:-2], sum(observed[-2:])], [*wanted[:-2], sum(wanted[-2:])]
    assert chisquare(observed, wanted).pvalue > 1e-3


def test_noise_of_neighbouring_positions_seeds_and_choices_is_independent() -> None:
    logits = torch.zeros(16)
    for change in ("seed", "choice", "position"):
        rows = range(2000)
        samplings = [
            RowSampling(seed=r if change == "seed" else 1, choice=r if change == "choice" else 0) for r in rows
        ]
        histories = [([0], [0] * (r if change == "position" else 0)) for r in rows]
        token_ids = sample(logits.expand(len(rows), -1), batch(samplings, histories)).token_ids.tolist()
        pairs = Counter(pairwise(token_ids))
        assert chisquare([pairs[a, b] for a in range(16) for b in range(16)]).pvalue > 1e-3, change


TIED_LOGITS = st.lists(st.integers(-8, 8).map(lambda n: n / 2), min_size=2, max_size=40)


@settings(max_examples=200, deadline=None)
@given(
    logits=TIED_LOGITS,
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    num_candidates=st.integers(1, 45),
)
def test_filters_keep_exactly_what_the_reference_keeps(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, num_candidates: int
) -> None:
    row = RowSampling(seed=0, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = list(reference.survivors(logits, row))
    found = survivors(torch.tensor([logits]), [row], num_candidates)
    kept = found.ids[found.kept].tolist()
    assert kept == expected[: len(kept)]
    if len(expected) < num_candidates or num_candidates >= len(logits):
        assert found.complete
    if found.complete:
        assert kept == expected


def test_filters_by_hand() -> None:
    logits = torch.tensor([0.1, 0.4, 0.4, 0.1]).log()
    kept: dict[tuple[tuple[str, Any], ...], list[int]] = {
        (("top_k", 1),): [1],
        (("top_k", 3),): [1, 2, 0],
        (("top_p", 0.3),): [1],
        (("top_p", 0.41),): [1, 2],
        (("top_p", 0.85),): [1, 2, 0],
        (("min_p", 0.2),): [1, 2, 0, 3],
        (("min_p", 0.3),): [1, 2],
        (("top_k", 2), ("top_p", 0.49)): [1],
        (("top_k", 2), ("top_p", 0.51)): [1, 2],
        (): [1, 2, 0, 3],
    }
    for options, expected in kept.items():
        found = survivors(logits[None], [RowSampling(seed=0, **dict(options))], 4)
        assert found.ids[found.kept].tolist() == expected, options


def test_survivors_beyond_the_first_candidates_are_found() -> None:
    """Flat logits: the nucleus has thousands of tokens, and a token outside the first look wins."""
    logits = torch.linspace(0, -1, 6000)[None]
    for seed in range(4):
        row = RowSampling(seed=seed, top_p=0.9)
        assert (
            sample(logits, batch([row])).token_ids.tolist() == reference.sample(logits, batch([row])).token_ids.tolist()
        )
    assert max(draws(logits[0], 64, top_p=0.99)) > 256


def random_row(chance: random.Random) -> RowSampling:
    choose = chance.choice
    return RowSampling(
        seed=chance.randrange(2**64),
        choice=choose([0, 3]),
        temperature=choose([0.0, 0.5, 1.0, 2.0]),
        top_k=choose([0, 0, 1, 5, 290]),
        top_p=choose([1.0, 1.0, 0.3, 0.9, 0.999]),
        min_p=choose([0.0, 0.0, 0.05, 0.5]),
        repetition_penalty=choose([1.0, 1.3, 0.8]),
        presence_penalty=choose([0.0, 0.5]),
        frequency_penalty=choose([0.0, -0.5]),
        logit_bias=choose([{}, {3: 5.0, 7: -100.0}]),
        min_tokens=choose([0, 5]),
        stop_token_ids=choose([(), (1, 2)]),
        num_logprobs=choose([None, 0, 3]),
    )


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_reference_and_rows_do_not_depend_on_neighbours(seed: int) -> None:
    num_rows, num_tokens = 10, 300
    chance, g = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, num_tokens, generator=g) * 3
    mask = torch.rand(num_rows, num_tokens, generator=g) < 0.5 if seed % 2 else None
    samplings = [random_row(chance) for _ in range(num_rows)]
    histories = [tuple(chance.choices(range(num_tokens), k=chance.randrange(9)) for _ in range(2)) for _ in samplings]
    before = logits.clone()
    together = sample(logits, batch(samplings, histories), mask=mask)
    assert torch.equal(logits, before)
    expected = reference.sample(logits, batch(samplings, histories), mask=mask)
    assert together.token_ids.tolist() == expected.token_ids.tolist()
    for r in range(num_rows):
        row = slice(r, r + 1)
        alone = sample(logits[row], batch(samplings[row], histories[row]), mask=None if mask is None else mask[row])
        assert alone.token_ids.tolist() == together.token_ids[row].tolist()
        assert alone.logprobs == together.logprobs[row]


def test_a_draw_is_the_same_at_real_size_alone_and_with_two_threads() -> None:
    logits = torch.randn(12, 49152, generator=torch.Generator().manual_seed(0)) * 5
    samplings = [RowSampling(seed=r, top_p=0.9 if r % 2 else 1.0, num_logprobs=2) for r in range(12)]
    together = sample(logits, batch(samplings))
    with threads(2):
        again = sample(logits, batch(samplings))
        alone = [sample(logits[r : r + 1], batch(samplings[r : r + 1])) for r in range(12)]
    assert again.token_ids.tolist() == together.token_ids.tolist() == [int(a.token_ids) for a in alone]
    assert again.logprobs == together.logprobs == [a.logprobs[0] for a in alone]


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    assert greedy([1.0, 3.0, 3.0, 2.0]) == 1


def test_a_tiny_temperature_is_greedy() -> None:
    assert set(draws(torch.tensor([1.0, 3.0, 2.9]), 20, temperature=1e-30)) == {1}
    assert set(draws(torch.tensor([1.0, 3.0, 2.9]), 20, temperature=1e-30, top_p=0.9)) == {1}


def test_logit_bias() -> None:
    assert greedy([1.0, 2.0, 0.0], logit_bias={0: 1.5}) == 0
    assert greedy([1.0, 2.0, 0.0], logit_bias={1: -100.0}) == 0
    assert set(draws(torch.zeros(5), 50, logit_bias={3: 100.0})) == {3}


def test_stop_tokens_wait_for_min_tokens() -> None:
    options: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": (1, 2), "logit_bias": {1: 100.0}}
    logits = [0.0, 5.0, 4.0]
    assert [greedy(logits, ([0], [0] * n), **options) for n in range(4)] == [0, 0, 1, 1]


def test_presence_penalty_looks_at_the_output_only_and_once() -> None:
    assert greedy([1.0, 1.5], ([1, 1], []), presence_penalty=1.0) == 1
    assert greedy([1.0, 1.5], ([], [1]), presence_penalty=0.4) == 1
    assert greedy([1.0, 1.5], ([], [1]), presence_penalty=0.6) == 0
    assert greedy([1.0, 1.5], ([], [1, 1, 1]), presence_penalty=0.4) == 1


def test_frequency_penalty_counts() -> None:
    assert greedy([1.0, 1.5], ([1, 1, 1], [1]), frequency_penalty=0.2) == 1
    assert greedy([1.0, 1.5], ([], [1, 1, 1]), frequency_penalty=0.2) == 0
    assert greedy([1.0, 1.5], ([], [0, 1, 0]), frequency_penalty=-0.6) == 0


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    assert greedy([2.0, 3.0], ([1], []), repetition_penalty=2.0) == 0
    assert greedy([2.0, 3.0], ([], [1]), repetition_penalty=2.0) == 0
    assert greedy([2.0, 3.0], ([], [1, 1, 1]), repetition_penalty=1.4) == 1
    assert greedy([-3.0, -2.0], ([1], []), repetition_penalty=2.0) == 0
    assert greedy([-2.1, -4.0], ([0], []), repetition_penalty=0.5) == 0


def test_the_mask_rules_over_everything() -> None:
    mask = torch.tensor([[False, True, True, False]])
    for row in (
        RowSampling(seed=1, temperature=0, logit_bias={0: 100.0}),
        RowSampling(seed=1),
        RowSampling(seed=1, top_k=3),
    ):
        token_id = int(sample(torch.tensor([[9.0, 1.0, 1.5, 8.0]]), batch([row]), mask=mask).token_ids)
        assert token_id in (1, 2)


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    row = RowSampling(seed=0, temperature=0, logit_bias={2: 100.0}, repetition_penalty=2.0, num_logprobs=2)
    (entry,) = sample(logits, batch([row], [([1], [])])).logprobs
    expected = torch.log_softmax(logits[0].double(), dim=0).tolist()
    assert entry is not None
    assert (entry.token_id, entry.rank, entry.top_ids) == (2, 3, [1, 3])
    assert [entry.logprob, *entry.top_logprobs] == pytest.approx([expected[2], expected[1], expected[3]], abs=1e-12)


def test_no_rows() -> None:
    result = sample(torch.zeros(0, 10), batch([], []))
    assert result.token_ids.shape == (0,)
    assert result.logprobs == []
