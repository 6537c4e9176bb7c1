"""What `quantized_linear` costs at least."""


def bytes_moved(
    num_tokens: int,
    num_inputs: int,
    num_outputs: int,
    *,
    bits: int,
    scale_bytes: int,
    itemsize: int,
    has_bias: bool = False,
) -> int:
    """Weight, all its scales and zeros (`scale_bytes`), rows and results once each."""
    numbers = num_tokens * (num_inputs + num_outputs) + num_outputs * has_bias
    return num_outputs * num_inputs * bits // 8 + scale_bytes + numbers * itemsize


def operations(num_tokens: int, num_inputs: int, num_outputs: int) -> int:
    """A multiplication and an addition for each weight and token; a subtraction and a product for each weight."""
    return 2 * (num_tokens + 1) * num_inputs * num_outputs
