"""Cut a step's attention into equal pieces: tiles of query rows × spans of keys. Integers only; reads no K, V or Q.

What makes a result independent of its neighbours is decided here: spans lie at absolute multiples of a fixed number
of tokens and each tile's spans are in rising order, whatever the chunk of queries and whoever else is in the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens of a span. Changing it changes the last bits of every result.
SPAN = 128
# Queries of a tile: a sequence uses the smallest that holds all its queries, else as many of the largest as it needs.
TILE_SIZES = (1, 16, 64)
# Matrix products give a row the same bits for every number of rows that is a multiple of this.
ROW_MULTIPLE = 4
# Bounds of temporary memory: numbers gathered and computed at a time, and partial results kept at a time.
MAX_SLAB_NUMBERS = 1 << 20
MAX_PARTIAL_NUMBERS = 1 << 24


@dataclass(frozen=True, slots=True)
class Slab:
    """Consecutive items of a tile group, computed at once. An item is one tile with one span of keys."""

    items: slice
    tiles: Tensor  # [num_items] int64: each item's tile
    cache_rows: Tensor  # [num_items · num_kv_heads · span / block_size] int64: block · num_kv_heads + head
    hidden: Tensor | None  # [num_items, num_rows, span] bool: True where the query may not see the key; None: sees all


@dataclass(frozen=True, slots=True)
class TileGroup:
    """Tiles of one size with all their spans; their partial results are combined together."""

    tile_size: int  # queries of a tile
    num_rows: int  # rows of a tile in the products: (query, head of the group), up to a ROW_MULTIPLE
    query_rows: Tensor  # [num_tiles · tile_size] int64: which row of Q is in each place; spare places repeat one
    used_places: Tensor  # [num_used] int64: the places that are not spare
    used_rows: Tensor  # [num_used] int64: the rows of Q that are in them
    tiles: Tensor  # [num_items] int64: each item's tile, never falling; spans rise within a tile
    slabs: list[Slab]


@dataclass(frozen=True, slots=True)
class Tile:
    """Some consecutive queries of one sequence, and the spans that at least one of them sees."""

    sequence: int
    first_row: int  # of Q
    num_queries: int
    first_position: int
    spans: range


@dataclass(frozen=True, slots=True)
class Cut:
    """How attention is cut, as far as the model decides it."""

    block_size: int
    num_kv_heads: int
    group: int  # query heads of a KV head
    head_dim: int
    window: int | None

    @property
    def span(self) -> int:
        return max(SPAN, self.block_size)

    def num_rows(self, tile_size: int) -> int:
        return -(-tile_size * self.group // ROW_MULTIPLE) * ROW_MULTIPLE


def plan_work(query_starts: Tensor, kv_lens: Tensor, block_tables: Tensor, cut: Cut) -> list[TileGroup]:
    """All tile groups of a step. ValueError where blocks do not fill spans."""
    if cut.span % cut.block_size:
        raise ValueError(f"block size {cut.block_size} does not divide {cut.span} tokens; use a power of two")
    by_size: dict[int, list[Tile]] = {size: [] for size in TILE_SIZES}
    starts = query_starts.tolist()
    for sequence, kv_len in enumerate(kv_lens.tolist()):
        num_queries = starts[sequence + 1] - starts[sequence]
        size = next((size for size in TILE_SIZES if size >= num_queries), TILE_SIZES[-1])
        by_size[size] += _tiles(sequence, starts[sequence], num_queries, kv_len, size, cut)
    last_blocks = (kv_lens - 1) // cut.block_size
    return [
        _tile_group(tiles, size, block_tables, last_blocks, cut)
        for size in TILE_SIZES
        for tiles in _runs(by_size[size], max_spans=_max_spans(size, cut))
    ]


def _tiles(sequence: int, first_row: int, num_queries: int, kv_len: int, tile_size: int, cut: Cut) -> Iterator[Tile]:
    """The queries of one sequence, tile by tile."""
    for start in range(0, num_queries, tile_size):
        size = min(tile_size, num_queries - start)
        position = kv_len - num_queries + start
        first_key = 0 if cut.window is None else max(0, position - cut.window + 1)
        spans = range(first_key // cut.span, (position + size - 1) // cut.span + 1)
        yield Tile(sequence, first_row + start, size, position, spans)


def _max_spans(tile_size: int, cut: Cut) -> int:
    return MAX_PARTIAL_NUMBERS // (cut.num_kv_heads * cut.num_rows(tile_size) * cut.head_dim)


def _runs(tiles: list[Tile], *, max_spans: int) -> Iterator[list[Tile]]:
    """Cut the list into runs that have at most max_spans together; a tile with more is a run of its own."""
    run: list[Tile] = []
    num_spans = 0
    for tile in tiles:
        if run and num_spans + len(tile.spans) > max_spans:
            yield run
            run, num_spans = [], 0
        run.append(tile)
        num_spans += len(tile.spans)
    if run:
        yield run


def _tile_group(tiles: list[Tile], tile_size: int, block_tables: Tensor, last_blocks: Tensor, cut: Cut) -> TileGroup:
    device = block_tables.device
    places = torch.arange(tile_size, device=device)
    # [num_tiles, 1] each.
    sequences, first_rows, last_places, first_positions = torch.tensor(
        [(tile.sequence, tile.first_row, tile.num_queries - 1, tile.first_position) for tile in tiles], device=device
    ).T[:, :, None]
    # [num_items] each.
    item_tiles, item_spans = torch.tensor(
        [(t, span) for t, tile in enumerate(tiles) for span in tile.spans], device=device
    ).T.contiguous()

    item_sequences = sequences[item_tiles]
    blocks_per_span = cut.span // cut.block_size
    columns = item_spans[:, None] * blocks_per_span + torch.arange(blocks_per_span, device=device)
    # A span's end may lie behind the sequence's last block: read that block again there, its keys are hidden.
    blocks = block_tables[item_sequences, columns.minimum(last_blocks[item_sequences])]
    cache_rows = blocks[:, None, :] * cut.num_kv_heads + torch.arange(cut.num_kv_heads, device=device)[:, None]

    # The newest key that each row sees, counted from its item's span. Spare rows follow the tile's last query.
    row_places = torch.arange(cut.num_rows(tile_size), device=device) // cut.group
    positions = first_positions + row_places.minimum(last_places)
    newest = positions[item_tiles] - item_spans[:, None] * cut.span

    query_rows = (first_rows + places.minimum(last_places)).flatten()
    used_places = (places <= last_places).flatten().nonzero().flatten()
    return TileGroup(
        tile_size=tile_size,
        num_rows=cut.num_rows(tile_size),
        query_rows=query_rows,
        used_places=used_places,
        used_rows=query_rows[used_places],
        tiles=item_tiles,
        slabs=[
            Slab(items, item_tiles[items], cache_rows[items].flatten(), _hidden(newest[items], cut))
            for items in _slices(len(item_tiles), tile_size, cut)
        ],
    )


def _slices(num_items: int, tile_size: int, cut: Cut) -> list[slice]:
    item_numbers = cut.num_kv_heads * cut.span * 2 * (cut.head_dim + cut.num_rows(tile_size))
    step = max(1, MAX_SLAB_NUMBERS // item_numbers)
    return [slice(start, min(start + step, num_items)) for start in range(0, num_items, step)]


def _hidden(newest: Tensor, cut: Cut) -> Tensor | None:
    """newest [num_items, num_rows] → which keys of its span each row may not see; None where each sees all."""
    keys = torch.arange(cut.span, device=newest.device)
    hidden = keys > newest[:, :, None]
    if cut.window is not None:
        hidden |= keys <= newest[:, :, None] - cut.window
    return hidden if bool(hidden.any()) else None
