"""What `sample` costs at least."""


def bytes_moved(num_rows: int, num_tokens: int, *, has_mask: bool = False) -> int:
    """Every float32 logit read once, and its byte of the mask."""
    return num_rows * num_tokens * (4 + has_mask)


def operations(num_noisy_tokens: int) -> int:
    """Integer operations of the noise: ten rounds of ten for four tokens. `num_noisy_tokens` over all rows: the
    vocabulary for a row that draws from all tokens, its survivors for one that filters, none for a greedy one."""
    return 25 * num_noisy_tokens
