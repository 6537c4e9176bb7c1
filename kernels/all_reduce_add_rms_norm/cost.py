"""What `all_reduce_add_rms_norm` costs at least, on each rank."""


def bytes_moved(num_tokens: int, hidden_size: int, num_ranks: int, *, itemsize: int) -> int:
    """Own part read and laid out, all parts and the residual read, both results written, weights once."""
    return ((2 + num_ranks + 3) * num_tokens * hidden_size + hidden_size) * itemsize


def bytes_received(num_tokens: int, hidden_size: int, num_ranks: int, *, itemsize: int) -> int:
    """What comes from other ranks, over the links between them."""
    return (num_ranks - 1) * num_tokens * hidden_size * itemsize
