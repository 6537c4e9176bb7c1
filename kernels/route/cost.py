"""What `route` costs at least."""


def bytes_moved(num_tokens: int, num_experts: int, num_chosen: int, *, itemsize: int, has_bias: bool = False) -> int:
    """Logits read once, an id and a weight of four bytes written for each that is chosen."""
    return num_tokens * (num_experts * itemsize + num_chosen * 8) + has_bias * num_experts * 4


def operations(num_tokens: int, num_experts: int, num_chosen: int) -> int:
    """One score an expert, and a comparison of each expert for each that is chosen."""
    return num_tokens * num_experts * (1 + num_chosen)
