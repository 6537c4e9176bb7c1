"""What `gated_mul` costs at least."""


def bytes_moved(num_tokens: int, intermediate_size: int, *, itemsize: int) -> int:
    """Gate and up read, their product written."""
    return 3 * num_tokens * intermediate_size * itemsize


def operations(num_tokens: int, intermediate_size: int) -> int:
    """One activation, counted as one operation, and one multiplication."""
    return 2 * num_tokens * intermediate_size
