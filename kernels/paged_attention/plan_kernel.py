"""Device code that makes the work list of `paged_attention`: the same items as items.py, in one small launch.

One program, for all of it is prefix sums over a few hundred tiles. Its threads hand each other numbers through memory,
behind a barrier. Reads no K, V or Q; nothing is read back.
"""

import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.paged_attention.device_work import TILE_FIELDS, DeviceList
from llmd_kernels.paged_attention.items import FIELDS, ITEMS_PER_PROGRAM

# Sequences, tiles or items at a time: one a thread.
BLOCK = 128
# Tiles that each of BLOCK tiles is compared with at a time, to sort them.
COMPARED = 32
NUM_WARPS = 4

NUM_FIELDS = tl.constexpr(len(FIELDS))
TABLE_ROW = tl.constexpr(TILE_FIELDS.index("table_row"))
FIRST_ROW = tl.constexpr(TILE_FIELDS.index("first_row"))
NUM_QUERIES = tl.constexpr(TILE_FIELDS.index("num_queries"))
FIRST_POSITION = tl.constexpr(TILE_FIELDS.index("first_position"))
FIRST_SPLIT = tl.constexpr(TILE_FIELDS.index("first_split"))
END_SPLIT = tl.constexpr(TILE_FIELDS.index("end_split"))
NUM_PARTS = tl.constexpr(TILE_FIELDS.index("num_parts"))
PARTIAL_ROW = tl.constexpr(TILE_FIELDS.index("partial_row"))
COUNTER = tl.constexpr(TILE_FIELDS.index("counter"))
FIRST_FULL = tl.constexpr(TILE_FIELDS.index("first_full"))
REST = tl.constexpr(TILE_FIELDS.index("rest"))


def plan_on_device(planned: DeviceList, query_starts: Tensor, kv_lens: Tensor, places: Tensor | None) -> None:
    """Write header and items of the list for a step: tensors as in AttentionBatch."""
    cut = planned.cut
    plan[(1,)](
        query_starts,
        kv_lens,
        places,
        planned.workspace.header,
        planned.workspace.items,
        planned.tile_starts,
        planned.tiles,
        len(kv_lens),
        planned.tiles.shape[1],
        cut.max_partial_rows,
        TILE_QUERIES=cut.tile_queries,
        SPLIT=cut.split,
        HEADS=cut.num_kv_heads,
        GROUP=cut.group,
        WINDOW=cut.window,
        WANTED_ITEMS=cut.wanted_programs * ITEMS_PER_PROGRAM,
        BLOCK=BLOCK,
        COMPARED=COMPARED,
        num_warps=NUM_WARPS,
    )


@triton.jit
def last_at_most(sorted_numbers, count, wanted):
    """The last place (below `count`, at least 0) in `sorted_numbers` whose number is at most `wanted`, for each."""
    low = tl.zeros(wanted.shape, tl.int32)
    high = low + count
    remaining = count
    while remaining > 1:
        middle = (low + high) // 2
        is_right = tl.load(sorted_numbers + middle) <= wanted
        # With one place left it stays: its number is compared with nothing any more.
        has_more = high - low > 1
        low = tl.where(has_more & is_right, middle, low)
        high = tl.where(has_more & ~is_right, middle, high)
        remaining = (remaining + 1) // 2
    return low


# One kernel for buckets of all sizes.
@triton.jit(do_not_specialize=["num_seqs", "tile_stride", "max_partial_rows"])
def plan(
    query_starts, kv_lens, places, header, items, tile_starts, tiles, num_seqs, tile_stride, max_partial_rows,
    TILE_QUERIES: tl.constexpr, SPLIT: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr,
    WANTED_ITEMS: tl.constexpr, BLOCK: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    """tile_starts [num_seqs], tiles [len(TILE_FIELDS), tile_stride]: room for what the threads tell each other."""
    num_tiles = _count_tiles(query_starts, tile_starts, num_seqs, TILE_QUERIES, BLOCK)
    tl.debug_barrier()
    num_splits = _make_tiles(
        query_starts, kv_lens, places, tile_starts, tiles, num_seqs, num_tiles, tile_stride,
        TILE_QUERIES, SPLIT, WINDOW, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    run = tl.maximum((num_splits * HEADS + WANTED_ITEMS - 1) // WANTED_ITEMS, 1).to(tl.int32)
    num_full = _share(tiles, run, num_tiles, tile_stride, max_partial_rows, GROUP, BLOCK)
    tl.debug_barrier()
    _make_full_items(items, tiles, run, num_full, num_tiles, tile_stride, BLOCK)
    _make_rest_items(items, tiles, run, num_full, num_tiles, tile_stride, BLOCK, COMPARED)
    tl.store(header, num_full + num_tiles)
    tl.store(header + 1, tl.load(query_starts + num_seqs).to(tl.int32))


@triton.jit
def _count_tiles(query_starts, tile_starts, num_seqs, TILE_QUERIES: tl.constexpr, BLOCK: tl.constexpr):
    """Where each sequence's tiles begin; returns how many there are."""
    num_tiles = 0
    for first in range(0, num_seqs, BLOCK):
        sequence = first + tl.arange(0, BLOCK)
        exists = sequence < num_seqs
        start = tl.load(query_starts + sequence, mask=exists, other=0)
        end = tl.load(query_starts + sequence + 1, mask=exists, other=0)
        count = ((end - start + TILE_QUERIES - 1) // TILE_QUERIES).to(tl.int32)
        tl.store(tile_starts + sequence, num_tiles + tl.cumsum(count, 0) - count, mask=exists)
        num_tiles += tl.sum(count, 0)
    return num_tiles


@triton.jit
def _make_tiles(
    query_starts, kv_lens, places, tile_starts, tiles, num_seqs, num_tiles, tile_stride,
    TILE_QUERIES: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each tile's queries and splits; returns the splits of all tiles together."""
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, num_tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        exists = tile < num_tiles
        sequence = last_at_most(tile_starts, num_seqs, tile)
        offset = (tile - tl.load(tile_starts + sequence, mask=exists, other=0)) * TILE_QUERIES
        start = tl.load(query_starts + sequence, mask=exists, other=0).to(tl.int32)
        num_queries = tl.load(query_starts + sequence + 1, mask=exists, other=0).to(tl.int32) - start
        in_tile = tl.minimum(num_queries - offset, TILE_QUERIES)
        position = tl.load(kv_lens + sequence, mask=exists, other=0).to(tl.int32) - num_queries + offset
        first_split = tl.zeros([BLOCK], tl.int32)
        if WINDOW is not None:
            first_split = tl.maximum(position - WINDOW + 1, 0) // SPLIT
        end_split = (position + in_tile + SPLIT - 1) // SPLIT
        table_row = sequence
        if places is not None:
            table_row = tl.load(places + sequence, mask=exists, other=0).to(tl.int32)
        tl.store(tiles + TABLE_ROW * tile_stride + tile, table_row, mask=exists)
        tl.store(tiles + FIRST_ROW * tile_stride + tile, start + offset, mask=exists)
        tl.store(tiles + NUM_QUERIES * tile_stride + tile, in_tile, mask=exists)
        tl.store(tiles + FIRST_POSITION * tile_stride + tile, position, mask=exists)
        tl.store(tiles + FIRST_SPLIT * tile_stride + tile, first_split, mask=exists)
        tl.store(tiles + END_SPLIT * tile_stride + tile, end_split, mask=exists)
        total += tl.where(exists, end_split - first_split, 0)
    return tl.sum(total, 0)


@triton.jit
def _share(tiles, run, num_tiles, tile_stride, max_partial_rows, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Which tiles are shared by several items of `run` splits; returns how many items have so many splits for it.

    A tile's last item has the rest, which for a tile that is not shared is all of it.
    """
    num_full = 0
    num_shared = 0
    rows_before = tl.sum(tl.zeros([BLOCK], tl.int64), 0)
    for first in range(0, num_tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        exists = tile < num_tiles
        splits = tl.load(tiles + END_SPLIT * tile_stride + tile, mask=exists, other=0)
        splits -= tl.load(tiles + FIRST_SPLIT * tile_stride + tile, mask=exists, other=0)
        num_queries = tl.load(tiles + NUM_QUERIES * tile_stride + tile, mask=exists, other=0)
        rows = tl.where(splits > run, splits.to(tl.int64) * (num_queries * GROUP), 0)
        rows_until = rows_before + tl.cumsum(rows, 0)
        is_shared = (rows > 0) & (rows_until <= max_partial_rows)
        shared = is_shared.to(tl.int32)
        full = tl.where(is_shared, (splits - 1) // run, 0)
        tl.store(tiles + NUM_PARTS * tile_stride + tile, full + 1, mask=exists)
        partial_row = tl.where(is_shared, rows_until - rows, 0).to(tl.int32)
        tl.store(tiles + PARTIAL_ROW * tile_stride + tile, partial_row, mask=exists)
        counter = tl.where(is_shared, num_shared + tl.cumsum(shared, 0) - 1, 0)
        tl.store(tiles + COUNTER * tile_stride + tile, counter, mask=exists)
        tl.store(tiles + FIRST_FULL * tile_stride + tile, num_full + tl.cumsum(full, 0) - full, mask=exists)
        tl.store(tiles + REST * tile_stride + tile, splits - full * run, mask=exists)
        rows_before += tl.sum(rows, 0)
        num_shared += tl.sum(shared, 0)
        num_full += tl.sum(full, 0)
    return num_full


@triton.jit
def _make_full_items(items, tiles, run, num_full, num_tiles, tile_stride, BLOCK: tl.constexpr):
    """The longest items come first: those of a whole run."""
    for first in range(0, num_full, BLOCK):
        item = first + tl.arange(0, BLOCK)
        exists = item < num_full
        tile = last_at_most(tiles + FIRST_FULL * tile_stride, num_tiles, item)
        part = item - tl.load(tiles + FIRST_FULL * tile_stride + tile, mask=exists, other=0)
        first_split = tl.load(tiles + FIRST_SPLIT * tile_stride + tile, mask=exists, other=0) + part * run
        _store_item(items + item * NUM_FIELDS, tiles + tile, tile_stride, first_split, first_split + run, exists)


@triton.jit
def _make_rest_items(items, tiles, run, num_full, num_tiles, tile_stride, BLOCK: tl.constexpr, COMPARED: tl.constexpr):
    """Each tile's last item, the longest first: its place is the number of those that come before it."""
    for first in range(0, num_tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        exists = tile < num_tiles
        rest = tl.load(tiles + REST * tile_stride + tile, mask=exists, other=0)
        num_before = tl.zeros([BLOCK], tl.int32)
        for first_other in range(0, num_tiles, COMPARED):
            other = first_other + tl.arange(0, COMPARED)
            other_rest = tl.load(tiles + REST * tile_stride + other, mask=other < num_tiles, other=0)
            is_longer = other_rest[None, :] > rest[:, None]
            is_earlier = (other_rest[None, :] == rest[:, None]) & (other[None, :] < tile[:, None])
            num_before += tl.sum((is_longer | is_earlier).to(tl.int32), 1)
        end_split = tl.load(tiles + END_SPLIT * tile_stride + tile, mask=exists, other=0)
        place = items + (num_full + num_before) * NUM_FIELDS
        _store_item(place, tiles + tile, tile_stride, end_split - rest, end_split, exists)


@triton.jit
def _store_item(item, tile, tile_stride, first_split, end_split, mask):
    """The fields in their order, see items.py."""
    for field in tl.static_range(0, 4):
        tl.store(item + field, tl.load(tile + field * tile_stride, mask=mask, other=0), mask=mask)
    tl.store(item + 4, first_split, mask=mask)
    tl.store(item + 5, end_split, mask=mask)
    for field in tl.static_range(4, 9):
        tl.store(item + field + 2, tl.load(tile + field * tile_stride, mask=mask, other=0), mask=mask)
