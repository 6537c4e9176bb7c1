"""The Triton kernel of `paged_attention` in the interpreter: the float64 truth, every access, the same bits always."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from llmd_kernels.paged_attention import reference, triton_ops
from llmd_kernels.paged_attention.tiles import TileConfig
from tests.kernels.batches import Context, Heads, Inputs, context, inputs
from tests.kernels.proof.interpreter import Launch, interpreted

# Small, so that short contexts have many tiles and splits.
SMALL = TileConfig(rows=16, tile=16, split=32, num_warps=4, num_stages=1, programs_per_processor=1)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 20},
    "soft cap": {"soft_cap": 5.0},
    "sinks": {"sinks": True},
    "all": {"window": 33, "soft_cap": 3.0, "sinks": True},
}


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
    tolerance = TOLERANCE[step.q.dtype]
    torch.testing.assert_close(out.double(), truth(step, **options), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_equals_the_reference_on_a_ragged_step(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """What no query may read is NaN: unused blocks, slots behind a sequence's end, padding rows of Q."""
    contexts = [context(n, Heads(6, 2, 16), seed=n, dtype=dtype) for n in (1, 33, 70, 17, 90)]
    check(inputs(contexts, [1, 33, 1, 0, 7], filling=torch.nan), **options)


@pytest.mark.parametrize(
    ("heads", "block_size", "dtype"),
    [
        (Heads(4, 4, 64), 32, torch.bfloat16),
        (Heads(4, 1, 80), 16, torch.bfloat16),
        (Heads(8, 1, 96), 64, torch.float16),
        (Heads(2, 1, 128), 16, torch.float16),
        (Heads(2, 2, 192), 32, torch.bfloat16),
        (Heads(2, 1, 256), 16, torch.bfloat16),
        (Heads(40, 2, 16), 16, torch.bfloat16),
    ],
    ids=str,
)
def test_head_sizes_groups_and_block_sizes(heads: Heads, block_size: int, dtype: torch.dtype) -> None:
    contexts = [context(n, heads, seed=n, dtype=dtype) for n in (40, 5)]
    check(inputs(contexts, [1, 5], block_size=block_size, filling=torch.nan), sinks=True)


@settings(max_examples=12, deadline=None)
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


@pytest.mark.parametrize("num_processors", [1, 3, 100])
def test_bits_do_not_depend_on_who_works(monkeypatch: pytest.MonkeyPatch, num_processors: int) -> None:
    contexts = [context(n, Heads(4, 2, 16), seed=n, dtype=torch.bfloat16) for n in (100, 3, 70)]
    whole = attend(inputs(contexts, [20, 3, 1]), num_processors=2)
    assert torch.equal(attend(inputs(contexts, [20, 3, 1]), num_processors=num_processors), whole)
    monkeypatch.setattr(triton_ops, "MAX_PARTIAL_BYTES", 3000)
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
