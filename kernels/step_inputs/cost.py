"""What `step_inputs` costs at least."""

from llmd_kernels.step_inputs.packing import ROW_FIELDS


def bytes_moved(num_tokens: int, *, max_rows: int, max_tokens: int, max_logits: int) -> int:
    """The packed rows, each token's id and block, of 4 bytes; the inputs, padding included, of 8."""
    read = 4 * (len(ROW_FIELDS) * max_rows + 2 * num_tokens)
    return read + 8 * (3 * max_tokens + 6 * max_rows + 1 + max_logits)
