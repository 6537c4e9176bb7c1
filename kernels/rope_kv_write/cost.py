"""What `rope_kv_write` costs at least."""


def bytes_moved(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    rot_dim: int,
    itemsize: int,
    cache_itemsize: int,
) -> int:
    """Q, K and V read; Q written; K and V written to the cache; one row of float32 angles a token."""
    kv_numbers = 2 * num_kv_heads * head_dim
    q_numbers = num_heads * head_dim
    return num_tokens * ((2 * q_numbers + kv_numbers) * itemsize + kv_numbers * cache_itemsize + 4 * rot_dim)


def operations(num_tokens: int, num_heads: int, num_kv_heads: int, *, rot_dim: int) -> int:
    """Two multiplications and an addition for each rotated entry of Q and K."""
    return 3 * num_tokens * (num_heads + num_kv_heads) * rot_dim
