"""What `token_logprobs` costs at least."""


def bytes_moved(num_rows: int, num_tokens: int, *, itemsize: int) -> int:
    """Every logit read once; the results are small."""
    return num_rows * num_tokens * itemsize


def operations(num_rows: int, num_tokens: int) -> int:
    """For each logit an exponential, an addition, and comparisons with the chosen and the top ones."""
    return 4 * num_rows * num_tokens
