"""The work list of the Triton kernel: every query sees every split that it may, once, and nobody else's room."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmd_kernels.paged_attention.items import FIELDS, ITEMS_PER_PROGRAM, ItemCut, ItemList, plan_items


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
        s = item["sequence"]
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
    items = plan(*step, cut).items
    num_tiles = sum(-(-n // cut.tile_queries) for n in step[0])
    assert len(items) <= num_tiles + cut.wanted_programs * ITEMS_PER_PROGRAM // cut.num_kv_heads
    spans = items[:, FIELDS.index("end_split")] - items[:, FIELDS.index("first_split")]
    assert (np.diff(spans) <= 0).all()
