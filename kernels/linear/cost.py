"""What `linear` costs at least."""


def bytes_moved(num_tokens: int, num_inputs: int, num_outputs: int, *, itemsize: int, has_bias: bool = False) -> int:
    """Weight, rows and results once each."""
    numbers = num_outputs * num_inputs + num_tokens * (num_inputs + num_outputs) + num_outputs * has_bias
    return numbers * itemsize


def operations(num_tokens: int, num_inputs: int, num_outputs: int) -> int:
    """A multiplication and an addition for each weight and token."""
    return 2 * num_tokens * num_inputs * num_outputs
