"""What `scale_logits` costs at least."""


def bytes_moved(num_rows: int, num_tokens: int, *, itemsize: int) -> int:
    """Products read, float32 logits written."""
    return num_rows * num_tokens * (itemsize + 4)


def operations(num_rows: int, num_tokens: int, *, has_soft_cap: bool = False) -> int:
    """A division; with a cap two more and a tanh."""
    return num_rows * num_tokens * (1 + 3 * has_soft_cap)
