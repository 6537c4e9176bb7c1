"""`paged_attention` against its reference, and the same bits whatever else is in the step."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmd_kernels import AttentionBatch, paged_attention
from llmd_kernels.paged_attention import reference, work
from tests.kernels.batches import SMOLLM, Context, Heads, Inputs, context, inputs
from tests.kernels.conftest import threads

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 20},
    "wide window": {"window": 129},
    "soft cap": {"soft_cap": 5.0},
    "all": {"window": 33, "soft_cap": 3.0, "sinks": True},
}
OTHER_HEADS = [Heads(4, 4, 128), Heads(4, 1, 256), Heads(8, 1, 80), Heads(6, 2, 8)]


def attend(step: Inputs, **options: Any) -> Tensor:
    return paged_attention(step.q, step.k_cache, step.v_cache, step.batch, **with_sinks(step, options))


def with_sinks(step: Inputs, options: dict[str, Any]) -> dict[str, Any]:
    sinks = torch.linspace(-1, 2, step.q.shape[1]) if options.get("sinks") else None
    return {"scale": step.q.shape[2] ** -0.5, **options, "sinks": sinks}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("heads", [Heads(6, 2, 16), Heads(4, 1, 16), Heads(2, 2, 8)], ids=str)
def test_equals_the_reference_on_a_ragged_step(heads: Heads, options: dict[str, Any]) -> None:
    lens, num_queries = [1, 63, 130, 257, 17, 129], [1, 63, 1, 70, 0, 2]
    contexts = [context(n, heads, seed=n, dtype=torch.float64) for n in lens]
    step = inputs(contexts, num_queries)
    expected = reference.paged_attention(step.q, step.k_cache, step.v_cache, step.batch, **with_sinks(step, options))
    torch.testing.assert_close(attend(step, **options), expected, rtol=1e-12, atol=1e-12)
    narrow = Inputs(step.q.float(), step.k_cache.float(), step.v_cache.float(), step.batch)
    torch.testing.assert_close(attend(narrow, **options).double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("block_size", [1, 8, 32, 128, 256])
def test_any_power_of_two_as_block_size(block_size: int) -> None:
    contexts = [context(n, Heads(4, 2, 16), seed=n, dtype=torch.float64) for n in (300, 5)]
    step, usual = inputs(contexts, [9, 5], block_size=block_size), inputs(contexts, [9, 5])
    torch.testing.assert_close(attend(step), attend(usual), rtol=1e-12, atol=1e-12)


def test_a_block_size_that_does_not_fit_is_refused() -> None:
    step = inputs([context(30)], [1], block_size=24)
    with pytest.raises(ValueError, match="block size 24"):
        attend(step)


def test_tensors_that_stay_serve_every_step() -> None:
    """Tables of all live sequences, rows to spare, and nothing kept from the step before."""
    contexts = [context(n, Heads(4, 2, 16), seed=n) for n in (150, 5, 33)]
    whole = inputs(contexts, [5, 5, 1])
    tables = torch.full((9, whole.batch.block_tables.shape[1]), 10**6, dtype=torch.int32)
    places = torch.tensor([7, 2, 4, 0])
    tables[places[:3]] = whole.batch.block_tables.int()
    starts, lens = torch.zeros(5, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    batch = AttentionBatch(starts, lens, tables, whole.batch.block_size, places=places, is_static=True)
    static = Inputs(whole.q, whole.k_cache, whole.v_cache, batch)
    for num_queries, new_lens in (([5, 5, 1], [150, 5, 33]), ([11], [150]), ([0, 0, 11], [20, 0, 12])):
        ends = torch.tensor(num_queries).cumsum(0)
        starts[1 : len(ends) + 1], starts[len(ends) + 1 :] = ends, ends[-1]
        lens.zero_()[: len(new_lens)] = torch.tensor(new_lens)
        n = len(num_queries)
        step_tables = whole.batch.block_tables[:n]
        usual = AttentionBatch(starts[: n + 1].clone(), lens[:n].clone(), step_tables, batch.block_size)
        expected = attend(Inputs(whole.q, whole.k_cache, whole.v_cache, usual))
        assert torch.equal(attend(static), expected)
        truth = reference.paged_attention(static.q, static.k_cache, static.v_cache, batch, **with_sinks(static, {}))
        torch.testing.assert_close(expected, truth, rtol=1e-5, atol=2e-6)


def test_padding_rows_are_zero_and_never_spread() -> None:
    """`inputs` fills the padding rows of Q with NaN."""
    out = attend(inputs([context(5)], [5]))
    assert torch.isfinite(out).all()
    assert (out[5:] == 0).all()


def test_a_step_of_padding_only() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    cache = torch.zeros(1, 3, 16, 64)
    batch = AttentionBatch(torch.zeros(1, dtype=torch.int64), empty, torch.zeros(0, 1, dtype=torch.int64), 16)
    assert (paged_attention(torch.ones(8, 9, 64), cache, cache, batch, scale=1.0) == 0).all()


def test_what_lies_in_unwritten_slots_does_not_matter() -> None:
    contexts = [context(n, seed=n) for n in (1, 20, 200)]
    clean, dirty = inputs(contexts, [1, 3, 40]), inputs(contexts, [1, 3, 40], filling=3e4)
    assert torch.equal(attend(clean), attend(dirty))


def test_a_cache_of_another_dtype() -> None:
    step = inputs([context(100, dtype=torch.float32)], [10])
    rounded = Inputs(step.q, step.k_cache.bfloat16(), step.v_cache.bfloat16(), step.batch)
    widened = Inputs(step.q, step.k_cache.bfloat16().float(), step.v_cache.bfloat16().float(), step.batch)
    assert torch.equal(attend(rounded), attend(widened))


def test_a_float8_cache_with_a_scale_a_token() -> None:
    step = inputs([context(n, Heads(4, 2, 16), seed=n) for n in (150, 20)], [10, 1])
    scales = torch.rand(2, *step.k_cache.shape[:3], generator=torch.Generator().manual_seed(0)) + 0.5
    caches = [cache.to(torch.float8_e4m3fn) for cache in (step.k_cache, step.v_cache)]
    options: dict[str, Any] = {"scale": 0.25, "k_scales": scales[0], "v_scales": scales[1]}
    result = paged_attention(step.q, *caches, step.batch, **options)
    exact = reference.paged_attention(step.q.double(), *caches, step.batch, **options)
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=2e-6)


def test_large_scores_stay_finite() -> None:
    one = context(300)
    step = inputs([Context(one.q * 100, one.k * 100, one.v)], [300])
    assert torch.isfinite(attend(step)[:300]).all()


@pytest.mark.parametrize(
    ("heads", "options"),
    [(SMOLLM, options) for options in VARIANTS.values()] + [(heads, VARIANTS["all"]) for heads in OTHER_HEADS],
    ids=str,
)
def test_bits_do_not_depend_on_chunks_neighbours_or_blocks(heads: Heads, options: dict[str, Any]) -> None:
    one, length = context(260, heads, seed=1), 260
    whole = attend(inputs([one], [length]), **options)[:length]
    others = [context(n, heads, seed=n) for n in (1, 5, 140, 300)]

    for size in (1, 7, 16, 100):
        ends = range(size, length + 1, size) if size > 1 else (1, 2, 100, 127, 128, 129, 255, 256, 257, 260)
        for end in ends:
            until = Context(one.q[:end], one.k[:end], one.v[:end])
            assert torch.equal(attend(inputs([until], [size]), **options)[:size], whole[end - size : end]), (size, end)

    step = inputs([*others[:2], one, *others[2:]], [1, 5, 1, 100, 33], block_seed=7)
    assert torch.equal(attend(step, **options)[6], whole[-1])
    step = inputs([*others, one], [1, 1, 1, 1, 40], block_seed=8, block_size=32)
    assert torch.equal(attend(step, **options)[4:44], whole[-40:])
    step = inputs([one] * 20, [1] * 20, block_seed=9)
    assert all(torch.equal(row, whole[-1]) for row in attend(step, **options)[:20])


def test_bits_do_not_depend_on_threads() -> None:
    contexts = [context(n, seed=n) for n in (300, 40, 129)]
    alone = attend(inputs(contexts, [150, 1, 1]))
    with threads(2):
        assert torch.equal(attend(inputs(contexts, [150, 1, 1])), alone)


def test_bits_do_not_depend_on_how_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = [context(n, seed=n) for n in (700, 3, 260)]
    whole = attend(inputs(contexts, [90, 3, 1]))
    monkeypatch.setattr(work, "MAX_SLAB_NUMBERS", 1)
    monkeypatch.setattr(work, "MAX_PARTIAL_NUMBERS", 1)
    assert torch.equal(attend(inputs(contexts, [90, 3, 1])), whole)


def test_spans_before_the_window_are_not_read() -> None:
    step = inputs([context(600)], [1])
    outside = step.batch.block_tables[0, : 384 // 16]
    step.k_cache[outside] = torch.nan
    step.v_cache[outside] = torch.nan
    assert torch.isfinite(attend(step, window=100)).all()


def test_the_work_of_a_step_is_planned_once_for_all_layers() -> None:
    step = inputs([context(40)], [3])
    cut = work.Cut(16, 3, 3, 64, None)
    assert step.batch.work(cut) is step.batch.work(cut)
    assert step.batch.work(cut) is not step.batch.work(work.Cut(16, 3, 3, 64, 8))
