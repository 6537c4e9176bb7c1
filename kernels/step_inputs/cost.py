"""What `step_inputs` costs at least."""


def bytes_moved(num_rows: int, num_tokens: int, num_logits: int, *, max_rows: int, max_tokens: int) -> int:
    """Seven fields a row of 4 bytes, a token's id and block of 4; outputs of 8 bytes, padding included."""
    return 4 * (7 * max_rows + 2 * num_tokens) + 8 * (3 * max_tokens + 3 * max_rows + 1 + num_logits + 3 * max_rows)
