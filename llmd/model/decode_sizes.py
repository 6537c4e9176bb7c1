"""How many rows the captured decode steps of a GPU have: the same launches serve every step of a size. Pure.

A step runs in the smallest size that holds its rows. Empty rows cost little beside the weights.
"""

from collections.abc import Sequence

SIZES = (1, 2, 4, *range(8, 257, 8))


def sizes_for(max_rows: int) -> Sequence[int]:
    """The sizes that steps of up to so many rows need, rising. Steps with more rows than the last are not captured."""
    return SIZES[: sum(size < max_rows for size in SIZES) + 1]
