"""Which steps of a GPU are captured as graphs, by their size: the same launches serve every step of a size. Pure.

A decode step (one token a row) runs in the smallest size that holds its rows, any other in the smallest that holds its
tokens. What is empty in it costs little beside the weights, and less than the launches that a graph saves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llmd.model.parallel import ONE_RANK, Rank
from llmd.model.parameters import parameters
from llmd.model.spec import ModelSpec

ROW_SIZES = (1, 2, 4, *range(8, 257, 8))
# From 64 on at most a fifth of a step is empty.
TOKEN_SIZES = (16, 32, 48, *(base * quarters for base in (16, 32, 64, 128, 256) for quarters in range(4, 8)), 2048)

# Estimates, not measured: what launching a layer's kernels one by one takes the host, and what a large GPU computes.
LAUNCH_SECONDS = 300e-6  # a layer
MULTIPLICATIONS = 300e12  # a second, each with its addition


@dataclass(frozen=True, slots=True)
class CapturedSizes:
    """The sizes of steps that are captured, rising; larger ones are not."""

    rows: Sequence[int] = ()  # of decode steps
    tokens: Sequence[int] = ()  # of all others, which have at most `max_rows` rows

    @property
    def max_rows(self) -> int:
        return max(self.rows, default=0)

    @property
    def max_tokens(self) -> int:
        return max(*self.rows, *self.tokens, 0)


NOTHING_CAPTURED = CapturedSizes()


def captured_sizes(spec: ModelSpec, *, max_num_seqs: int, max_num_tokens: int, rank: Rank = ONE_RANK) -> CapturedSizes:
    """Those that pay, as far as steps of so many sequences and tokens need them."""
    return CapturedSizes(
        rows=_up_to(max_num_seqs, ROW_SIZES),
        tokens=_up_to(min(max_num_tokens, tokens_beside_launches(spec, rank)), TOKEN_SIZES),
    )


def tokens_beside_launches(spec: ModelSpec, rank: Rank = ONE_RANK) -> float:
    """So many tokens keep the device busy while the host launches the next step's kernels one by one.

    More gain nothing by a graph, and would lose by what is empty in it.
    """
    multiplications = 0.0
    for parameter in parameters(spec):
        head, *rest = parameter.name.split(".")
        # an embedding is looked up, and few tokens come to the head
        if head == "layers":
            moe = spec.layers[int(rest[0])].moe
            share = moe.num_chosen / moe.num_experts if moe is not None and parameter.num_experts else 1.0
            multiplications += share * parameter.num_elements(rank)
    return LAUNCH_SECONDS * len(spec.layers) * MULTIPLICATIONS / multiplications


def _up_to(most: float, sizes: Sequence[int]) -> Sequence[int]:
    return sizes[: sum(size < most for size in sizes) + 1]
