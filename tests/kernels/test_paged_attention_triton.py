"""The Triton kernel of `paged_attention` in the interpreter: the same bits always, bytes moved, faults that are caught.

More cases against the float64 truth: tests/kernels/proof/operations/paged_attention.py.
"""

import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from llmd_kernels.paged_attention import cost, host_work, reference, triton_kernel, triton_ops, workspace
from llmd_kernels.paged_attention.items import FIELDS, ItemList, plan_items
from llmd_kernels.paged_attention.tiles import TABLE, TileConfig
from tests.kernels.batches import Context, Heads, Inputs, context, inputs
from tests.kernels.proof.checks import TOLERANCES
from tests.kernels.proof.interpreter import Launch, interpreted
from tests.kernels.proof.memory import OutOfBounds, Race
from tests.kernels.proof.operations.paged_attention import SMALL, VARIANTS


def options_for(step: Inputs, options: dict[str, Any]) -> dict[str, Any]:
    sinks = torch.linspace(-1, 2, step.q.shape[1]) if options.get("sinks") else None
    return {"scale": step.q.shape[2] ** -0.5, **options, "sinks": sinks}


def launch(
    step: Inputs, *, config: TileConfig = SMALL, num_processors: int = 2, **options: Any
) -> tuple[Tensor, Launch]:
    """In the interpreter, programs in a random order: every address is checked, and that all of `out` is written."""
    with interpreted(shuffle=1) as launches:
        out = triton_ops.paged_attention(
            step.q,
            step.k_cache,
            step.v_cache,
            step.batch,
            **options_for(step, options),
            config=config,
            num_processors=num_processors,
        )
    (launched,) = launches
    assert launched.unwritten("out") == 0
    return out, launched


def attend(step: Inputs, **options: Any) -> Tensor:
    return launch(step, **options)[0]


def truth(step: Inputs, **options: Any) -> Tensor:
    parts = (step.q.double(), step.k_cache.double(), step.v_cache.double())
    return reference.paged_attention(*parts, step.batch, **options_for(step, options))


def check(step: Inputs, **options: Any) -> None:
    out = attend(step, **options)
    options = {name: value for name, value in options.items() if name not in ("config", "num_processors")}
    tolerance = TOLERANCES[step.q.dtype]
    torch.testing.assert_close(out.double(), truth(step, **options), rtol=tolerance, atol=tolerance)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_random_steps(data: st.DataObject) -> None:
    lens = data.draw(st.lists(st.integers(1, 80), min_size=1, max_size=4))
    num_queries = [data.draw(st.integers(0, min(n, 12))) for n in lens]
    group = data.draw(st.sampled_from([1, 3, 4]))
    contexts = [context(n, Heads(group, 1, 16), seed=n, dtype=torch.bfloat16) for n in lens]
    step = inputs(contexts, num_queries, block_seed=data.draw(st.integers(0, 9)), filling=torch.nan)
    check(
        step,
        window=data.draw(st.none() | st.integers(1, 90)),
        sinks=data.draw(st.booleans()),
        num_processors=data.draw(st.sampled_from([1, 8, 64])),
    )


@pytest.mark.parametrize("options", [VARIANTS["plain"], VARIANTS["all"]], ids=["plain", "all"])
def test_bits_do_not_depend_on_chunks_neighbours_or_blocks(options: dict[str, Any]) -> None:
    """Prefill at once, in chunks, token by token (decode); alone and among others; one program a tile or several."""
    heads, length = Heads(4, 1, 16), 110
    one = context(length, heads, seed=1, dtype=torch.bfloat16)
    whole = attend(inputs([one], [length]), **options)[:length]

    for size, ends in {50: (50, 100), 7: (7, 35, 105), 1: (1, 16, 17, 32, 33, 64, 97, 110)}.items():
        for end in ends:
            until = Context(one.q[:end], one.k[:end], one.v[:end])
            assert torch.equal(attend(inputs([until], [size]), **options)[:size], whole[end - size : end]), (size, end)

    others = [context(n, heads, seed=n, dtype=torch.bfloat16) for n in (1, 5, 90, 40)]
    step = inputs([*others[:2], one, *others[2:]], [1, 5, 1, 1, 33], block_seed=7)
    assert torch.equal(attend(step, **options)[6], whole[-1])
    step = inputs([*others, one], [1, 1, 1, 1, 40], block_seed=8, block_size=32)
    assert torch.equal(attend(step, **options)[4:44], whole[-40:])


@pytest.mark.parametrize(("arch", "head_dim"), [("sm_90", 128), ("gfx942", 256)])
def test_bits_of_decode_are_those_of_prefill_with_what_ships(arch: str, head_dim: int) -> None:
    one, config = context(300, Heads(4, 1, head_dim), dtype=torch.bfloat16), TABLE[arch, head_dim, "16/16"]
    step = inputs([one], [50])
    chunk = attend(step, config=config)[:50]
    torch.testing.assert_close(chunk.double(), truth(step)[:50], rtol=1.2e-2, atol=1.2e-2)
    for end in (300, 299, 257, 256, 251):
        until = Context(one.q[:end], one.k[:end], one.v[:end])
        decoded = attend(inputs([until], [1], block_seed=end), config=config, num_processors=end)
        assert torch.equal(decoded[0], chunk[end - 251]), end


@pytest.mark.parametrize("num_processors", [1, 3, 100])
def test_bits_do_not_depend_on_who_works(monkeypatch: pytest.MonkeyPatch, num_processors: int) -> None:
    contexts = [context(n, Heads(4, 2, 16), seed=n, dtype=torch.bfloat16) for n in (100, 3, 70)]
    whole = attend(inputs(contexts, [20, 3, 1]), num_processors=2)
    assert torch.equal(attend(inputs(contexts, [20, 3, 1]), num_processors=num_processors), whole)
    monkeypatch.setattr(workspace, "MAX_PARTIAL_BYTES", 3000)
    assert torch.equal(attend(inputs(contexts, [20, 3, 1]), num_processors=num_processors), whole)


def test_a_step_serves_all_layers() -> None:
    """The counters are as they were, so the next launch with the same work list is right too."""
    step = inputs([context(100, Heads(2, 1, 16), dtype=torch.bfloat16)], [2])
    first = attend(step, num_processors=50)
    assert torch.equal(attend(step, num_processors=50), first)


def test_padding_rows_are_zero() -> None:
    step = inputs([context(5, Heads(3, 3, 16), dtype=torch.bfloat16)], [5])
    assert (attend(step)[5:] == 0).all()
    empty = torch.zeros(0, dtype=torch.int64)
    batch = type(step.batch)(torch.zeros(1, dtype=torch.int64), empty, torch.zeros(0, 1, dtype=torch.int64), 16)
    only_padding = Inputs(torch.full((8, 3, 16), torch.nan), step.k_cache, step.v_cache, batch)
    assert (attend(only_padding) == 0).all()


@pytest.mark.parametrize("num_processors", [1, 50], ids=["one program", "split"])
def test_a_float8_cache_with_a_scale_a_token(num_processors: int) -> None:
    heads = Heads(4, 2, 32)
    step = inputs([context(n, heads, seed=n, dtype=torch.bfloat16) for n in (70, 5)], [3, 5], filling=torch.nan)
    scales = torch.rand(2, *step.k_cache.shape[:3], generator=torch.Generator().manual_seed(0)) + 0.5
    rounded = [cache.to(torch.float8_e4m3fn) for cache in (step.k_cache, step.v_cache)]
    narrow = Inputs(step.q, rounded[0], rounded[1], step.batch)
    check(narrow, k_scales=scales[0], v_scales=scales[1], num_processors=num_processors, window=40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float8_by_its_bits_is_bitwise_float8(dtype: torch.dtype) -> None:
    """All 254 numbers that float8_e4m3fn has."""
    step = inputs([context(64, Heads(2, 1, 16), dtype=dtype)], [2])
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0)
    caches = [numbers.repeat(step.k_cache.numel() // 256 + 1)[first:] for first in (0, 100)]
    narrow = [cache[: step.k_cache.numel()].view_as(step.k_cache).to(torch.float8_e4m3fn) for cache in caches]
    scales = torch.full(step.k_cache.shape[:3], 1 / 448)
    step = Inputs(step.q, narrow[0], narrow[1], step.batch)
    options = {"k_scales": scales, "v_scales": scales}
    expected = attend(step, **options)
    assert torch.equal(attend(step, **options, config=replace(SMALL, float8_by_bits=True)), expected)
    assert expected[:2].abs().min() > 0


# The shape of one KV head of Llama 3 with the tiling that ships for it, except that the few rows are not filled up.
LLAMA = Heads(4, 1, 128)
SHIPPED = TileConfig(rows=16, tile=64, split=256, num_warps=8, num_stages=3, programs_per_processor=1)


@pytest.mark.parametrize(
    ("num_processors", "window", "at_most"), [(1, None, 1.015), (1, 300, 1.03), (50, None, 1.05), (50, 300, 1.10)]
)
def test_decode_moves_what_it_must(num_processors: int, window: int | None, at_most: float) -> None:
    """Keys and values once, to the byte. The rest: the ids of blocks, the work list and, split, partial results.

    A window of 300 keys begins within a split, so that it has three partial results where two would do.
    """
    lens = [1000] * 4
    step = inputs([context(n, LLAMA, seed=i, dtype=torch.bfloat16) for i, n in enumerate(lens)], [1] * 4)
    step = replace(step, q=step.q[:4].contiguous())
    _, launched = launch(step, config=SHIPPED, num_processors=num_processors, window=window)
    caches = [launched.memory.region(name) for name in ("k_cache", "v_cache")]
    assert sum(region.loaded for region in caches) == 2 * sum(min(n, window or n) for n in lens) * 128 * 2
    moved = sum(region.loaded + region.stored for region in launched.memory.regions)
    least = cost.bytes_moved([(1, n) for n in lens], 4, 1, 128, itemsize=2, cache_itemsize=2, window=window)
    assert 1 <= moved / least <= at_most, moved / least


def test_prefill_reads_keys_once_a_tile_of_queries() -> None:
    """8 queries a tile: query tile i reads the 8 · (i + 1) keys that it sees. On a device the L2 cache serves that."""
    length, heads = 48, Heads(4, 2, 16)
    _, launched = launch(inputs([context(length, heads, dtype=torch.bfloat16)], [length]))
    keys = sum(range(8, length + 1, 8))
    assert launched.memory.region("k_cache").loaded == keys * heads.num_kv_heads * 16 * 2


def ragged_step() -> Inputs:
    return inputs([context(n, Heads(2, 1, 16), seed=n, dtype=torch.bfloat16) for n in (70, 100)], [1, 9])


@pytest.mark.parametrize("block", [10**6, -1])
def test_a_wrong_block_is_caught(block: int) -> None:
    step = ragged_step()
    step.batch.block_tables[1, 3] = block
    with pytest.raises(Exception, match="out of bounds") as caught:
        attend(step)
    assert isinstance(caught.value, OutOfBounds)


def test_a_context_longer_than_its_blocks_is_caught() -> None:
    step = ragged_step()
    step.batch.kv_lens[0] += 64
    with pytest.raises(OutOfBounds):
        attend(step)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda items: items[1:], AssertionError),  # nobody writes a tile
        (lambda items: items[[0, *range(len(items))]], (Race, AssertionError)),  # somebody does twice
        (lambda items: changed(items, "num_parts", 1), Race),
        (lambda items: changed(items, "partial_row", 0), Race),
        (lambda items: changed(items, "counter", 0), (Race, AssertionError)),
        (lambda items: changed(items, "first_row", 0), (Race, AssertionError)),
        (lambda items: changed(items, "first_split", 0), (Race, AssertionError)),
        (lambda items: changed(items, "num_queries", 3), (OutOfBounds, Race, AssertionError)),
    ],
    ids=["dropped", "twice", "alone", "same room", "same counter", "same rows", "same splits", "same size"],
)
def test_a_wrong_work_list_is_caught(monkeypatch: pytest.MonkeyPatch, fault: Any, error: Any) -> None:
    def plan(*args: Any) -> ItemList:
        work = plan_items(*args)
        return replace(work, items=fault(work.items))

    check(ragged_step(), num_processors=50)
    monkeypatch.setattr(host_work, "plan_items", plan)
    with pytest.raises(error):
        check(ragged_step(), num_processors=50)


def changed(items: Any, field: str, value: int) -> Any:
    items = items.copy()
    items[:, FIELDS.index(field)] = value
    return items


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('sem="acq_rel"', 'sem="relaxed"'),
        ('sem="acq_rel"', 'sem="release"'),
        ("== num_parts - 1", "== 0"),
        ("exists = (keys >= first_key) & (keys < end)", "exists = keys < end + 16"),
        ("exists = (keys >= first_key) & (keys < end)", "exists = keys < end"),
        ("keys[None, :] <= positions[:, None]", "keys[None, :] < positions[:, None]"),
        ("> (positions - window)", ">= (positions - window)"),
        ("seen, tl.exp2(scores - largest_next[:, None]), 0.0)", "seen, tl.exp2(scores), 0.0)"),
        ("values * share[:, None], input", "values, input"),
        ("tl.store(counter, 0)", "pass"),
        ("tl.fma(total_next, share_next, total * share)", "total + total_next"),
        ("keys % PAGE) * token_rows", "keys % PAGE) * token_rows * 2"),
        ("first = partial + (split - tile_first_split) * split_rows", "first = partial + split * split_rows"),
        ("_zero_padding(out, tl.load(header + 1) + program", "_zero_padding(out, num_rows + program"),
    ],
)
def test_a_fault_in_the_kernel_is_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, right: str, wrong: str
) -> None:
    source = inspect.getsource(triton_kernel)
    assert right in source
    (tmp_path / "wrong_kernel.py").write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("wrong_kernel", tmp_path / "wrong_kernel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(triton_ops, "attend", module.attend)
    contexts = [context(n, Heads(2, 1, 16), seed=n, dtype=torch.bfloat16) for n in (110, 150)]
    step = inputs(contexts, [4, 9], filling=torch.nan)
    # What lies before the window belongs to others by now.
    step.batch.block_tables[0, : (106 - 29) // 16] = 10**6
    step.batch.block_tables[1, : (141 - 29) // 16] = 10**6
    with pytest.raises((OutOfBounds, Race, AssertionError)):
        check_twice(step, num_processors=50, window=30)


def check_twice(step: Inputs, **options: Any) -> None:
    """As two layers do, with one work list."""
    check(step, **options)
    check(step, **options)
