"""What `linear_draw` costs at least."""


def bytes_moved(num_rows: int, hidden_size: int, num_tokens: int, *, itemsize: int) -> int:
    """The weight and the rows once, an int64 token a row."""
    return (num_tokens + num_rows) * hidden_size * itemsize + num_rows * 8


def operations(num_rows: int, hidden_size: int, num_tokens: int, *, num_noisy_rows: int = 0) -> int:
    """A multiplication and an addition for each weight and row; 25 integer operations for the noise of a token."""
    return 2 * num_rows * hidden_size * num_tokens + 25 * num_noisy_rows * num_tokens
