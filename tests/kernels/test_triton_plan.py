"""Attention's work lists made on the device: the host's items, within the room that a bucket has, in one launch."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd_kernels.paged_attention import plan_kernel, workspace
from llmd_kernels.paged_attention.device_work import AttentionWork, allocate_lists
from llmd_kernels.paged_attention.items import FIELDS, plan_items
from llmd_kernels.paged_attention.tiles import TileConfig
from llmd_kernels.paged_attention.workspace import LayerKind
from tests.kernels.proof.faults import with_fault
from tests.kernels.proof.interpreter import interpreted
from tests.kernels.proof.memory import OutOfBounds, Race

CPU = torch.device("cpu")
CONFIG = TileConfig(rows=16, tile=16, split=32, num_warps=4, num_stages=1, programs_per_processor=1)
KINDS = (LayerKind(4, 2, 16), LayerKind(4, 2, 16, window=70), LayerKind(6, 1, 64, window=1))


@dataclass(frozen=True)
class Bucket:
    """A step, and the room that it has."""

    num_queries: list[int]
    lens: list[int]
    max_seqs: int
    max_tokens: int
    num_processors: int

    def work(self) -> AttentionWork:
        """With what earlier steps may have left in it."""
        work = allocate_lists(
            dict.fromkeys(KINDS, CONFIG),
            max_seqs=self.max_seqs,
            max_tokens=self.max_tokens,
            max_len=max([1, *self.lens]),
            num_processors=self.num_processors,
            device=CPU,
        )
        for planned in work.lists.values():
            for tensor in (planned.workspace.header, planned.workspace.items, planned.tile_starts, planned.tiles):
                tensor.fill_(2**31 - 1)
        return work

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sequences that are not there have no tokens and no context."""
        num_queries, lens = torch.zeros(2, self.max_seqs, dtype=torch.int64)
        num_queries[: len(self.lens)], lens[: len(self.lens)] = torch.tensor([self.num_queries, self.lens])
        starts = torch.zeros(self.max_seqs + 1, dtype=torch.int64)
        starts[1:] = num_queries.cumsum(0)
        return starts, lens, torch.arange(self.max_seqs).flip(0) * 3


@st.composite
def buckets(draw: st.DrawFn) -> Bucket:
    lens = draw(st.lists(st.integers(0, 400), max_size=9))
    num_queries = [draw(st.integers(0, min(n, 40))) for n in lens]
    spare = st.integers(0, 3)
    return Bucket(
        num_queries,
        lens,
        max_seqs=max(1, len(lens) + draw(spare)),
        max_tokens=max(1, sum(num_queries) + draw(spare)),
        num_processors=draw(st.sampled_from([1, 4, 30])),
    )


def check(bucket: Bucket, *, has_places: bool = True) -> None:
    """The same items in some order, the longest first; nothing is written beyond what there is room for."""
    work = bucket.work()
    starts, lens, places = bucket.tensors()
    with interpreted(check_overflow=True):
        work.plan(starts, lens, places if has_places else None)
    for planned in work.lists.values():
        host = plan_items(starts.numpy(), lens.numpy(), planned.cut, places.numpy() if has_places else None)
        num_items, num_rows = planned.workspace.header.tolist()
        assert (num_items, num_rows) == (len(host.items), host.num_rows)
        items = planned.workspace.items[:num_items].numpy()
        assert sorted(items.tolist()) == sorted(host.items.tolist())
        spans = items[:, FIELDS.index("end_split")] - items[:, FIELDS.index("first_split")]
        if host.num_partial_rows < planned.cut.max_partial_rows:
            assert (np.diff(spans) <= 0).all()
        assert num_items * planned.cut.num_kv_heads <= planned.workspace.num_programs
        scratch, heads = planned.workspace.scratch, planned.cut.num_kv_heads
        assert host.num_partial_rows * heads * 2 <= len(scratch.partial_sums)
        assert host.num_partial_rows * heads * 16 <= len(scratch.partial_values)
        assert host.num_counters * heads <= len(scratch.counters)


@settings(max_examples=6, deadline=None)
@given(buckets(), st.booleans())
def test_the_device_makes_the_items_that_the_host_makes(bucket: Bucket, has_places: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Several blocks of everything.
        patch.setattr(plan_kernel, "BLOCK", 16)
        patch.setattr(plan_kernel, "COMPARED", 8)
        check(bucket, has_places=has_places)


MANY = Bucket([1] * 130 + [37, 3], [*range(1, 131), 300, 3], 140, 200, num_processors=20)
FEW = Bucket([1] * 18 + [37, 3], [*range(1, 19), 300, 3], 22, 60, num_processors=20)
LONG = Bucket([1], [4000], 8, 8, num_processors=132)
CASES = (
    Bucket([], [], 2, 2, num_processors=1),
    Bucket([0, 5, 0], [7, 100, 0], 4, 8, num_processors=30),
    LONG,
    Bucket([150], [150], 1, 150, num_processors=4),
    MANY,
)


@pytest.mark.parametrize("bucket", CASES, ids=["empty", "some empty", "long", "prompt", "many"])
def test_with_what_ships(bucket: Bucket) -> None:
    check(bucket)


def test_where_there_is_no_room_one_program_takes_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "MAX_PARTIAL_BYTES", 12_000)
    check(MANY)
    check(LONG)


FAULTS = [
    ("<= wanted", "< wanted"),
    ("has_more & is_right", "is_right"),
    ("num_tiles += tl.sum(count, 0)", "num_tiles = tl.sum(count, 0)"),
    ("tl.minimum(num_queries - offset, TILE_QUERIES)", "tl.minimum(num_queries, TILE_QUERIES)"),
    ("position - WINDOW + 1, 0)", "position - WINDOW, 0)"),
    ("(position + in_tile + SPLIT - 1)", "(position + in_tile + SPLIT)"),
    ("total += tl.where(exists, end_split - first_split, 0)", "total += tl.where(exists, end_split, 0)"),
    ("num_splits * HEADS + WANTED_ITEMS - 1", "num_splits * HEADS"),
    ("splits > run,", "splits >= run,"),
    ("(rows_until <= max_partial_rows)", "(rows <= max_partial_rows)"),
    ("(splits - 1) // run", "splits // run"),
    ("rows_until - rows, 0)", "rows_until, 0)"),
    ("tl.cumsum(shared, 0) - 1", "tl.cumsum(shared, 0)"),
    ("num_shared += tl.sum(shared, 0)", "pass"),
    ("+ part * run", "+ run"),
    ("is_longer | is_earlier", "is_longer"),
    ("(num_full + num_before) * NUM_FIELDS", "num_before * NUM_FIELDS"),
    ("table_row = tl.load(places + sequence, mask=exists, other=0).to(tl.int32)", "pass"),
    ("tl.load(query_starts + num_seqs)", "tl.load(query_starts + num_seqs - 1)"),
]


@pytest.mark.parametrize(("right", "wrong"), FAULTS)
def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, right: str, wrong: str) -> None:
    faulty = with_fault(plan_kernel, right, wrong, tmp_path)
    # Several blocks of few.
    faulty.__dict__.update(BLOCK=16, COMPARED=8)
    monkeypatch.setattr(plan_kernel, "plan_on_device", faulty.plan_on_device)
    monkeypatch.setattr(workspace, "MAX_PARTIAL_BYTES", 12_000)
    with pytest.raises((AssertionError, OutOfBounds, Race)):
        check_all(FEW, LONG, replace(FEW, num_processors=60))


def check_all(*buckets: Bucket) -> None:
    for bucket in buckets:
        check(bucket)


def test_a_smaller_bucket_shares_the_scratch_of_a_larger_one() -> None:
    sizes = {"max_len": 500, "num_processors": 30, "device": CPU}
    configs = dict.fromkeys(KINDS, CONFIG)
    large = allocate_lists(configs, max_seqs=16, max_tokens=64, **sizes)
    small = allocate_lists(configs, max_seqs=4, max_tokens=4, **sizes, scratch=large.scratch)
    assert small.scratch is large.scratch
    with pytest.raises(ValueError, match="the largest one first"):
        allocate_lists(
            configs, max_seqs=16, max_tokens=64, **sizes, scratch=replace(large.scratch, counters=torch.zeros(1))
        )
