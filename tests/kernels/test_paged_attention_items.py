"""The work list of the Triton kernel, where every query meets every split once, and its table of tiles."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmd_kernels.paged_attention.items import (
    FIELDS,
    ItemCut,
    ItemList,
    extra_items,
    max_partial_rows,
    max_shared_tiles,
    max_tiles,
    plan_items,
)
from llmd_kernels.paged_attention.tiles import TABLE, find_config


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """(numbers of queries, context lengths)"""
    lens = draw(st.lists(st.integers(0, 300), max_size=5))
    return [draw(st.integers(0, n)) for n in lens], lens


cuts = st.builds(
    ItemCut,
    tile_queries=st.sampled_from([1, 5, 16]),
    split=st.sampled_from([16, 64]),
    num_kv_heads=st.sampled_from([1, 8]),
    group=st.sampled_from([1, 4]),
    window=st.none() | st.integers(1, 200),
    wanted_programs=st.sampled_from([1, 10, 1000]),
    max_partial_rows=st.sampled_from([0, 100, 10**6]),
)


def plan(num_queries: list[int], lens: list[int], cut: ItemCut) -> ItemList:
    return plan_items(np.array([0, *num_queries]).cumsum(), np.array(lens, dtype=np.int64), cut)


@given(steps(), cuts)
def test_every_query_meets_every_split_that_it_sees_once(step: tuple[list[int], list[int]], cut: ItemCut) -> None:
    num_queries, lens = step
    work = plan(num_queries, lens, cut)
    met: dict[tuple[int, int], int] = {}
    for row in work.items:
        item = dict(zip(FIELDS, row.tolist(), strict=True))
        assert 1 <= item["num_queries"] <= cut.tile_queries
        assert item["tile_first_split"] <= item["first_split"] < item["end_split"] <= item["tile_end_split"]
        starts = np.array([0, *num_queries]).cumsum()
        s = item["table_row"]
        assert item["first_position"] == lens[s] - num_queries[s] + item["first_row"] - starts[s]
        for query in range(item["num_queries"]):
            for split in range(item["first_split"], item["end_split"]):
                key = item["first_row"] + query, split
                met[key] = met.get(key, 0) + 1
    assert set(met.values()) <= {1}
    first_row = 0
    for n, length in zip(num_queries, lens, strict=True):
        for query in range(n):
            position = length - n + query
            first = 0 if cut.window is None else max(0, position - cut.window + 1)
            needed = range(first // cut.split, position // cut.split + 1)
            assert all((first_row + query, split) in met for split in needed)
        first_row += n
    assert work.num_rows == first_row


@given(steps(), cuts)
def test_parts_of_a_tile_have_room_and_a_counter_of_their_own(step: tuple[list[int], list[int]], cut: ItemCut) -> None:
    work = plan(*step, cut)
    tiles: dict[int, list[dict[str, int]]] = {}
    for row in work.items:
        item = dict(zip(FIELDS, row.tolist(), strict=True))
        tiles.setdefault(item["first_row"], []).append(item)
    taken: list[range] = []
    counters = []
    for parts in tiles.values():
        assert {part["num_parts"] for part in parts} == {len(parts)}
        if len(parts) == 1:
            continue
        (counter,) = {part["counter"] for part in parts}
        counters.append(counter)
        (start,) = {part["partial_row"] for part in parts}
        splits = parts[0]["tile_end_split"] - parts[0]["tile_first_split"]
        taken.append(range(start, start + splits * parts[0]["num_queries"] * cut.group))
    assert sorted(counters) == list(range(work.num_counters))
    taken.sort(key=lambda rows: rows.start)
    assert all(a.stop <= b.start for a, b in pairwise(taken))
    assert sum(map(len, taken)) == work.num_partial_rows <= cut.max_partial_rows


@given(steps(), cuts)
def test_a_captured_launch_knows_how_many_items_there_may_be(step: tuple[list[int], list[int]], cut: ItemCut) -> None:
    """One a tile and a fixed number more, whatever the lengths are; the longest come first."""
    num_queries, lens = step
    work = plan(num_queries, lens, cut)
    items = work.items
    num_tiles = sum(-(-n // cut.tile_queries) for n in num_queries)
    assert len(items) <= num_tiles + extra_items(cut)
    assert num_tiles <= max_tiles(len(lens), sum(num_queries), cut)
    assert work.num_counters <= max_shared_tiles(num_tiles, cut)
    # The tightest room that holds the step changes nothing.
    room = max_partial_rows(num_tiles, max([*lens, 0]), cut)
    assert work.num_partial_rows <= room
    assert np.array_equal(plan(num_queries, lens, replace(cut, max_partial_rows=room)).items, items)
    spans = items[:, FIELDS.index("end_split")] - items[:, FIELDS.index("first_split")]
    assert (np.diff(spans) <= 0).all()


def test_the_table_of_tiles_is_whole() -> None:
    for (_, head_dim, _), config in TABLE.items():
        assert config.split % config.tile == 0
        assert config.tile >= 16
        assert config.rows >= 16
        assert head_dim in (64, 128, 256)
    splits = {arch: {c.split for (a, _, _), c in TABLE.items() if a == arch} for arch, _, _ in TABLE}
    assert all(len(found) == 1 for found in splits.values())


def test_a_configuration_is_found_by_device_head_size_and_dtypes() -> None:
    bf16, float8 = torch.bfloat16, torch.float8_e4m3fn
    assert find_config("sm_90", 80, bf16, bf16) is TABLE["sm_90", 128, "16/16"]
    assert find_config("sm_90", 16, bf16, float8) is TABLE["sm_90", 64, "16/8"]
    assert find_config("sm_90", 256, torch.float32, bf16) is TABLE["sm_90", 256, "32"]
    by_bits = replace(TABLE["sm_80", 128, "16/8"], float8_by_bits=True)
    assert find_config("sm_80", 128, bf16, float8) == by_bits
    by_bits = replace(TABLE["sm_80", 128, "32/8"], float8_by_bits=True)
    assert find_config("sm_80", 128, torch.float32, float8) == by_bits
    assert find_config("sm_86", 128, bf16, float8) == replace(TABLE["sm_86", 128, "16/8"], float8_by_bits=True)
    assert find_config("sm_89", 128, bf16, float8) is TABLE["sm_89", 128, "16/8"]
    assert find_config("sm_121", 64, bf16, float8) is TABLE["sm_120", 64, "16/8"]
    assert find_config("sm_87", 64, bf16, float8) == replace(TABLE["sm_86", 64, "16/8"], float8_by_bits=True)
    assert find_config("gfx942", 64, bf16, float8) == replace(TABLE["gfx942", 64, "16/8"], float8_by_bits=True)
    assert find_config("gfx942", 64, bf16, torch.float8_e4m3fnuz) is None
    assert find_config("sm_80", 128, bf16, torch.float8_e5m2) is None
    assert find_config("sm_75", 128, bf16, bf16) is None
    assert find_config("sm_90", 512, bf16, bf16) is None
    assert find_config("sm_90", 128, torch.float64, torch.float64) is None
