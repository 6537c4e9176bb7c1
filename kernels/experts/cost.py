"""What `experts` costs at least."""


def bytes_moved(
    num_tokens: int, num_chosen: int, num_distinct: int, hidden_size: int, intermediate_size: int, *, itemsize: int
) -> int:
    """Weights of the num_distinct experts that are chosen at all, rows and results once each, ids and weights."""
    weights = num_distinct * 3 * hidden_size * intermediate_size * itemsize
    return weights + 2 * num_tokens * hidden_size * itemsize + num_tokens * num_chosen * 8


def operations(num_tokens: int, num_chosen: int, hidden_size: int, intermediate_size: int) -> int:
    """A multiplication and an addition for each weight of each chosen expert and token."""
    return 2 * num_tokens * num_chosen * 3 * hidden_size * intermediate_size
