"""Device code of `paged_attention`: one launch for all tiles of a step. Knows nothing of plans, tables or torch.

What a query's bits depend on: its own keys, TILE and SPLIT. For each split in rising order an online softmax over the
split's tiles, begun afresh; then the splits' results merged one after the other. Tiles and splits lie at absolute
multiples, and a tile or split of which a query sees nothing changes nothing: maxima stay, factors are 1, terms are 0.
Who merges (the program itself, or the last of several to arrive) does not matter: both do `_merge` in the same order.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# The largest score where nothing is seen. Finite, so that differences stay numbers.
NOTHING_SEEN = tl.constexpr(-1e30)
# Powers of two by which the exponents' biases differ: 15 and 127 from 7.
FLOAT16_TO_FLOAT8 = tl.constexpr(2.0**8)
BFLOAT16_TO_FLOAT8 = tl.constexpr(2.0**120)
NUM_FIELDS = tl.constexpr(11)


@triton.jit
def _merge(largest, total, values, largest_next, total_next, values_next):
    """One softmax from two. With fma in so many words: a compiler that chose could choose differently in two places."""
    merged = tl.maximum(largest, largest_next)
    share = tl.exp2(largest - merged)
    share_next = tl.exp2(largest_next - merged)
    total = tl.fma(total_next, share_next, total * share)
    shares_next = tl.broadcast_to(share_next[:, None], values.shape)
    values = tl.fma(values_next, shares_next, values * share[:, None])
    return merged, total, values


@triton.jit
def _store_part(values_at, sums_at, used, largest, total, values):
    """What one split gives, for the program that will merge them."""
    tl.store(values_at, values, mask=used[:, None])
    tl.store(sums_at, largest, mask=used)
    tl.store(sums_at + 1, total, mask=used)


@triton.jit
def _load_part(values_at, sums_at, used):
    """As stored by any program. Past the first cache, which knows nothing of what other processors store."""
    largest = tl.load(sums_at, mask=used, other=0.0, cache_modifier=".cg")
    total = tl.load(sums_at + 1, mask=used, other=0.0, cache_modifier=".cg")
    values = tl.load(values_at, mask=used[:, None], other=0.0, cache_modifier=".cg")
    return largest, total, values


@triton.jit
def _numbers(loaded, dtype: tl.constexpr, FLOAT8_BY_BITS: tl.constexpr):
    """What a cache holds, as numbers of `dtype`. Every number of float8 is one of bfloat16 and of float16 too.

    By bits: sign, exponent and mantissa of float8_e4m3fn are moved to their places, and the smaller bias is made up by
    a power of two, which is exact. NaN would be 480: a cache is finite.
    """
    if FLOAT8_BY_BITS:
        bits = loaded.to(tl.uint16)
        sign = (bits & 0x80) << 8
        rest = bits & 0x7F
        if dtype == tl.float16:
            numbers = (sign | (rest << 7)).to(tl.float16, bitcast=True) * FLOAT16_TO_FLOAT8
        else:
            numbers = (sign | (rest << 4)).to(tl.bfloat16, bitcast=True) * BFLOAT16_TO_FLOAT8
    else:
        numbers = loaded
    return numbers.to(dtype)


@triton.jit
def _attend_split(
    q, positions, k_cache, v_cache, k_scales, v_scales, table, head, first_key, begin, end,
    block_rows, head_rows, token_rows, scale_block_stride, scale_head_stride, scale, soft_cap, window,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    FLOAT8_BY_BITS: tl.constexpr,
):  # fmt: skip
    """Softmax of q [ROWS, PADDED_DIM] over the keys begin … end - 1: (largest score, total, values)."""
    dims = tl.arange(0, PADDED_DIM)
    largest = tl.full([ROWS], NOTHING_SEEN, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for start in range(begin, end, TILE):
        keys = start + tl.arange(0, TILE)
        # Keys that no query of the tile sees are not read: their blocks may belong to others by now.
        exists = (keys >= first_key) & (keys < end)
        block = tl.load(table + keys // PAGE, mask=exists, other=0)
        # Counted in rows of HEAD_DIM numbers: 32 bits hold that and 64 the place; fewer registers than 64 throughout.
        cache_row = block * block_rows + head * head_rows + (keys % PAGE) * token_rows
        offset = cache_row.to(tl.int64) * HEAD_DIM
        if HEAD_DIM == PADDED_DIM:
            k_mask = exists[None, :]
            v_mask = exists[:, None]
        else:
            k_mask = exists[None, :] & (dims < HEAD_DIM)[:, None]
            v_mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_cache + offset[None, :] + dims[:, None], mask=k_mask, other=0.0)
        v = tl.load(v_cache + offset[:, None] + dims[None, :], mask=v_mask, other=0.0)
        k = _numbers(k, q.dtype, FLOAT8_BY_BITS)
        v = _numbers(v, q.dtype, FLOAT8_BY_BITS)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if HAS_SCALES:
            scale_offset = block * scale_block_stride + head * scale_head_stride + keys % PAGE
            scores *= tl.load(k_scales + scale_offset, mask=exists, other=0.0)[None, :]
        if HAS_SOFT_CAP:
            # tanh(x) = 1 - 2 / (1 + e^2x), which saturates instead of overflowing.
            doubled = scores * (scale * (2.0 * LOG2_E) / soft_cap)
            scores = (soft_cap * LOG2_E) * (1.0 - 2.0 / (1.0 + tl.exp2(doubled)))
        else:
            scores = scores * (scale * LOG2_E)
        seen = (keys[None, :] <= positions[:, None]) & exists[None, :]
        if HAS_WINDOW:
            seen = seen & (keys[None, :] > (positions - window)[:, None])
        scores = tl.where(seen, scores, NOTHING_SEEN)
        largest_next = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp2(scores - largest_next[:, None]), 0.0)
        share = tl.exp2(largest - largest_next)
        total = tl.fma(total, share, tl.sum(weights, 1))
        if HAS_SCALES:
            weights *= tl.load(v_scales + scale_offset, mask=exists, other=0.0)[None, :]
        values = tl.dot(weights.to(q.dtype), v, values * share[:, None], input_precision=PRECISION)
        largest = largest_next
    return largest, total, values


@triton.jit
def _zero_padding(out, first_row, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The program's share of the rows that belong to no sequence."""
    columns = tl.arange(0, BLOCK)
    for row in range(first_row, num_rows, tl.num_programs(0)):
        for start in range(0, WIDTH, BLOCK):
            place = row * WIDTH + start + columns
            tl.store(out + place, tl.zeros([BLOCK], out.dtype.element_ty), mask=start + columns < WIDTH)


# What changes from step to step must not make another kernel: compiling takes time, and one binary has one arithmetic.
@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def attend(  # noqa: PLR0915  (one straight line)
    q, k_cache, v_cache, k_scales, v_scales, sinks, out, block_tables,
    header, items, partial_values, partial_sums, counters,
    num_rows, block_rows, head_rows, token_rows, scale_block_stride, scale_head_stride, table_stride,
    scale, soft_cap, window,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr, ZEROS: tl.constexpr, FLOAT8_BY_BITS: tl.constexpr,
):  # fmt: skip
    """Program p attends item p // NUM_KV_HEADS for KV head p % NUM_KV_HEADS; programs beyond the items end at once.

    header int32 [2]: number of items, rows of q that are not padding; on the device, so that a captured launch, whose
    grid is fixed, serves every later step. Row r of a tile is query r // GROUP, head r % GROUP of the head's group.
    """
    program = tl.program_id(0)
    _zero_padding(out, tl.load(header + 1) + program, num_rows, NUM_KV_HEADS * GROUP * HEAD_DIM, ZEROS)
    if program >= tl.load(header) * NUM_KV_HEADS:
        return
    item = items + (program // NUM_KV_HEADS) * NUM_FIELDS
    head = program % NUM_KV_HEADS
    sequence = tl.load(item)
    first_row = tl.load(item + 1)
    num_queries = tl.load(item + 2)
    first_position = tl.load(item + 3)
    first_split = tl.load(item + 4)
    end_split = tl.load(item + 5)
    tile_first_split = tl.load(item + 6)
    tile_end_split = tl.load(item + 7)
    num_parts = tl.load(item + 8)
    partial_row = tl.load(item + 9)
    counter = counters + tl.load(item + 10) * NUM_KV_HEADS + head

    row = tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED_DIM)
    in_tile = row[:, None] * PADDED_DIM + dims[None, :]
    row_width: tl.constexpr = NUM_KV_HEADS * GROUP * HEAD_DIM
    used = row < num_queries * GROUP
    query_head = head * GROUP + row % GROUP
    places = ((first_row + row // GROUP) * row_width + query_head * HEAD_DIM)[:, None] + dims[None, :]
    in_q = used[:, None] & (dims < HEAD_DIM)[None, :]
    tile = tl.load(q + places, mask=in_q, other=0.0)
    positions = first_position + row // GROUP
    end_key = first_position + num_queries
    first_key = 0
    if HAS_WINDOW:
        first_key = tl.maximum(first_position - window + 1, 0)
    # A tile's partial results: [split, KV head, used row].
    tile_rows = num_queries * GROUP
    split_rows = NUM_KV_HEADS * tile_rows
    partial = partial_row.to(tl.int64) * NUM_KV_HEADS + head * tile_rows

    largest = tl.full([ROWS], NOTHING_SEEN, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for split in range(first_split, end_split):
        begin = tl.maximum(split * SPLIT, first_key // TILE * TILE)
        end = tl.minimum((split + 1) * SPLIT, end_key)
        split_largest, split_total, split_values = _attend_split(
            tile, positions, k_cache, v_cache, k_scales, v_scales, block_tables + sequence * table_stride,
            head, first_key, begin, end,
            block_rows, head_rows, token_rows, scale_block_stride, scale_head_stride, scale, soft_cap, window,
            ROWS=ROWS, HEAD_DIM=HEAD_DIM, PADDED_DIM=PADDED_DIM, PAGE=PAGE, TILE=TILE,
            HAS_SCALES=HAS_SCALES, HAS_SOFT_CAP=HAS_SOFT_CAP, HAS_WINDOW=HAS_WINDOW, PRECISION=PRECISION,
            FLOAT8_BY_BITS=FLOAT8_BY_BITS,
        )  # fmt: skip
        if num_parts > 1:
            first = partial + (split - tile_first_split) * split_rows
            _store_part(
                partial_values + first * PADDED_DIM + in_tile, partial_sums + first * 2 + row * 2, used,
                split_largest, split_total, split_values,
            )  # fmt: skip
        else:
            largest, total, values = _merge(largest, total, values, split_largest, split_total, split_values)

    complete = True
    if num_parts > 1:
        # All threads' stores come before the count, and the count of the others before the loads of the last.
        tl.debug_barrier()
        complete = tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1
        if complete:
            for split in range(tile_first_split, tile_end_split):
                first = partial + (split - tile_first_split) * split_rows
                split_largest, split_total, split_values = _load_part(
                    partial_values + first * PADDED_DIM + in_tile, partial_sums + first * 2 + row * 2, used
                )
                largest, total, values = _merge(largest, total, values, split_largest, split_total, split_values)
            # Ready for the next layer, which runs after this launch.
            tl.store(counter, 0)
    if complete:
        if HAS_SINKS:
            sink = tl.load(sinks + query_head, mask=used, other=0.0).to(tl.float32) * LOG2_E
            with_sink = tl.maximum(largest, sink)
            share = tl.exp2(largest - with_sink)
            values = values * share[:, None]
            total = tl.fma(total, share, tl.exp2(sink - with_sink))
        # Rows that are not used have seen nothing: 0 / 1 instead of 0 / 0.
        result = values / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out + places, result.to(out.dtype.element_ty), mask=in_q)
