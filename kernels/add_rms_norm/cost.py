"""What `add_rms_norm` costs at least."""


def bytes_moved(num_tokens: int, hidden_size: int, *, itemsize: int) -> int:
    """Two rows read and two written a token, the weight read once."""
    return (4 * num_tokens + 1) * hidden_size * itemsize


def operations(num_tokens: int, hidden_size: int) -> int:
    """The addition and the norm's four."""
    return 5 * num_tokens * hidden_size
