"""What `paged_attention` costs at least."""

from collections.abc import Iterable


def bytes_moved(
    sequences: Iterable[tuple[int, int]],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    itemsize: int,
    cache_itemsize: int,
    window: int | None = None,
) -> int:
    """`sequences`: (number of queries, context length) each. Q and the result once, each visible key and value once."""
    total = 0
    for num_queries, kv_len in sequences:
        if num_queries == 0:
            continue
        num_keys = kv_len if window is None else min(kv_len, num_queries + window - 1)
        kv_bytes = 2 * num_keys * num_kv_heads * cache_itemsize
        total += (2 * num_queries * num_heads * itemsize + kv_bytes) * head_dim
    return total


def operations(
    sequences: Iterable[tuple[int, int]], num_heads: int, head_dim: int, *, window: int | None = None
) -> int:
    """A multiplication and an addition for each visible (query, key) pair and entry, in Q·K and again in P·V."""
    pairs = 0
    for num_queries, kv_len in sequences:
        positions = range(kv_len - num_queries, kv_len)
        pairs += sum(p + 1 if window is None else min(p + 1, window) for p in positions)
    return 4 * pairs * num_heads * head_dim
