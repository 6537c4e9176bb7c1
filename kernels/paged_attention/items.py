"""The work list of the Triton kernel: which program attends which queries over which keys. Reads no K, V or Q.

The arithmetic of a query is fixed by `ItemCut.split` alone. Everything else here (tiles of queries, runs of splits,
the order of the list) decides who works when and how much, and changes no bit of any result.

Written with arrays and prefix sums only, so that a small kernel can build the same list on the device.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int32]

# The fields of an item, in order; the kernel reads them by these places.
FIELDS = (
    "table_row",  # the sequence's row of the block tables
    "first_row",  # of Q: the tile's first query
    "num_queries",  # of the tile
    "first_position",  # of the tile's first query in its sequence
    "first_split",  # the item's splits
    "end_split",
    "tile_first_split",  # all splits that the tile sees
    "tile_end_split",
    "num_parts",  # items that share the tile; 1: nothing is to be combined
    "partial_row",  # where the tile's partial results begin, in rows of one KV head
    "counter",  # counts the parts that have arrived
)
# Items a program should get, at least: more of them even out the end, fewer write fewer partial results.
ITEMS_PER_PROGRAM = 4


@dataclass(frozen=True, slots=True)
class ItemCut:
    """How a step is cut, as far as the model, the tile table and the device decide it."""

    tile_queries: int  # queries of a tile: they and their heads fill its rows
    split: int  # tokens of a split: keys s · split … (s + 1) · split - 1 belong to split s, of every sequence
    num_kv_heads: int
    group: int  # query heads of a KV head
    window: int | None
    wanted_programs: int  # that run at a time on the device
    max_partial_rows: int  # room for partial results, in rows of one KV head


@dataclass(frozen=True, slots=True)
class ItemList:
    """`items` hold for every KV head: the kernel takes each once a head."""

    items: Array  # [num_items, len(FIELDS)]: the longest first
    num_rows: int  # rows of Q that belong to sequences; the others are padding
    num_partial_rows: int  # in use, of one KV head
    num_counters: int


def max_tiles(max_seqs: int, max_tokens: int, cut: ItemCut) -> int:
    """Tiles of queries that a step of at most so many sequences and tokens can have.

    n tokens make at most (n + tile_queries - 1) / tile_queries tiles; a sequence without tokens makes none.
    """
    return (max_tokens + min(max_seqs, max_tokens) * (cut.tile_queries - 1)) // cut.tile_queries


def max_shared_tiles(num_tiles: int, cut: ItemCut) -> int:
    """Tiles that more than one item can share, of num_tiles: each has at least one item more than one."""
    return min(num_tiles, extra_items(cut))


def extra_items(cut: ItemCut) -> int:
    """Items that a step can have more than tiles, however long its contexts are.

    A run is at least num_splits · heads / (programs · ITEMS_PER_PROGRAM), num_splits being those of all tiles together;
    and of n splits a tile makes at most ceil(n / run) < n / run + 1 items.
    """
    return cut.wanted_programs * ITEMS_PER_PROGRAM // cut.num_kv_heads


def max_partial_rows(num_tiles: int, max_len: int, cut: ItemCut) -> int:
    """Rows of partial results (of one KV head) that num_tiles tiles of contexts of at most max_len tokens can take."""
    visible = max_len if cut.window is None else min(max_len, cut.window + cut.tile_queries - 1 + cut.split)
    num_splits = -(-visible // cut.split)
    return min(cut.max_partial_rows, max_shared_tiles(num_tiles, cut) * cut.tile_queries * cut.group * num_splits)


def plan_items(
    query_starts: npt.NDArray[np.int64],
    kv_lens: npt.NDArray[np.int64],
    cut: ItemCut,
    places: npt.NDArray[np.int64] | None = None,
) -> ItemList:
    """query_starts [num_seqs + 1], kv_lens [num_seqs], places [num_seqs], as in AttentionBatch."""
    num_queries = np.diff(query_starts)
    sequence, tile = _expand(-(-num_queries // cut.tile_queries))
    offset = tile * cut.tile_queries
    tile_queries = np.minimum(cut.tile_queries, num_queries[sequence] - offset)
    first_position = kv_lens[sequence] - num_queries[sequence] + offset
    first_key = np.zeros_like(first_position) if cut.window is None else first_position - cut.window + 1
    first_split = np.maximum(first_key, 0) // cut.split
    end_split = -(-(first_position + tile_queries) // cut.split)
    num_splits = end_split - first_split

    run = max(1, -(-int(num_splits.sum()) * cut.num_kv_heads // (cut.wanted_programs * ITEMS_PER_PROGRAM)))
    partial_rows = np.where(num_splits > run, tile_queries * cut.group * num_splits, 0)
    # Where there is no room for partial results one program takes the whole tile: slower, the same bits.
    shared = (partial_rows > 0) & (partial_rows.cumsum() <= cut.max_partial_rows)
    partial_rows = np.where(shared, partial_rows, 0)
    item_splits = np.where(shared, run, num_splits)
    num_parts = -(-num_splits // item_splits)

    of, part = _expand(num_parts)
    item_first = first_split[of] + part * item_splits[of]
    item_end = np.minimum(item_first + item_splits[of], end_split[of])
    columns = {
        "table_row": sequence[of] if places is None else places[sequence[of]],
        "first_row": query_starts[sequence[of]] + offset[of],
        "num_queries": tile_queries[of],
        "first_position": first_position[of],
        "first_split": item_first,
        "end_split": item_end,
        "tile_first_split": first_split[of],
        "tile_end_split": end_split[of],
        "num_parts": num_parts[of],
        "partial_row": np.where(shared, partial_rows.cumsum() - partial_rows, 0)[of],
        "counter": np.where(shared, shared.cumsum() - 1, 0)[of],
    }
    items = np.stack([columns[name] for name in FIELDS], axis=1).astype(np.int32)
    longest_first = np.argsort(item_first - item_end, kind="stable")
    return ItemList(
        items=items[longest_first],
        num_rows=int(query_starts[-1]),
        num_partial_rows=int(partial_rows.sum()),
        num_counters=int(shared.sum()),
    )


def _expand(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """counts [n] → (owner, number within its owner) of each of counts.sum() things: [2, 0] → [0, 0], [0, 1]."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)
