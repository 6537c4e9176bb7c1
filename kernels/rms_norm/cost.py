"""What `rms_norm` costs at least."""


def bytes_moved(num_tokens: int, hidden_size: int, *, itemsize: int) -> int:
    """Rows read and written once, the weight read once."""
    return (2 * num_tokens + 1) * hidden_size * itemsize


def operations(num_tokens: int, hidden_size: int) -> int:
    """Square, add; scale, weight."""
    return 4 * num_tokens * hidden_size
