"""What `top_tokens` costs at least."""


def bytes_moved(num_rows: int, num_tokens: int, k: int, *, itemsize: int) -> int:
    """Every logit read once; values and int64 ids written."""
    return num_rows * (num_tokens * itemsize + k * (itemsize + 8))


def operations(num_rows: int, num_tokens: int) -> int:
    """One comparison a logit."""
    return num_rows * num_tokens
