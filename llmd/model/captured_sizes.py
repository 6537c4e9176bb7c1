"""Which steps of a GPU are captured as graphs, by their size: the same launches serve every step of a size. Pure.

A decode step (one token a row) runs in the smallest size that holds its rows, any other in the smallest that holds its
tokens. What is empty in it costs little beside the weights, and less than the launches that a graph saves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llmd.model.memory import activation_bytes, dequantized_bytes
from llmd.model.parallel import ONE_RANK, Rank
from llmd.model.parameters import parameters
from llmd.model.quantized_layouts import has_quantized_kernels, kept_bytes, kept_parameters
from llmd.model.spec import ModelSpec

ROW_SIZES = (1, 2, 4, *range(8, 257, 8))
# From 64 on at most a fifth of a step is empty.
TOKEN_SIZES = (16, 32, 48, *(base * quarters for base in (16, 32, 64, 128, 256) for quarters in range(4, 8)), 2048)

# Estimates, not measured: what launching a layer's kernels one by one takes the host, and what a large GPU does.
LAUNCH_SECONDS = 300e-6  # a layer
MULTIPLICATIONS = 300e12  # a second, each with its addition
BYTES_READ = 3e12  # a second

# A captured launch holds its parameters and its node; a layer of a dense model has 7 to 12.
LAUNCH_BYTES = 4 << 10
LAUNCHES_PER_LAYER = 12
DECODE_KINDS = 2  # decode steps that end with drawn tokens, and those that end with hidden states


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
        return max((*self.rows, *self.tokens), default=0)


NOTHING_CAPTURED = CapturedSizes()


def captured_sizes(
    spec: ModelSpec, *, max_num_seqs: int, max_num_tokens: int, dtype_bytes: int, rank: Rank = ONE_RANK
) -> CapturedSizes:
    """Those that pay, as far as steps of so many sequences and tokens need them."""
    paying = tokens_beside_launches(spec, dtype_bytes=dtype_bytes, rank=rank)
    return CapturedSizes(
        rows=_up_to(max_num_seqs, ROW_SIZES),
        tokens=_up_to(max_num_tokens, [size for size in TOKEN_SIZES if size <= paying]),
    )


def tokens_beside_launches(spec: ModelSpec, *, dtype_bytes: int, rank: Rank = ONE_RANK) -> float:
    """The tokens for which a device computes, and reads the weights, while the host launches kernels one by one.

    A step of more gains nothing by a graph, as the next one is launched while it runs, and would lose by what is empty.
    """
    wanted = parameters(spec)
    keeps_quantized = has_quantized_kernels(on_cpu=False, dtype_bytes=dtype_bytes)
    kept = kept_parameters(wanted, spec.quantization) if keeps_quantized else {}
    multiplications = 0.0  # of a token
    bytes_of_all = bytes_of_experts = bytes_of_chosen = 0.0  # what all tokens share; the experts; those of a token
    for parameter in wanted:
        num_bytes = parameter.num_bytes(rank, dtype_bytes)
        if parameter.name in kept:
            num_bytes = kept_bytes(*kept[parameter.name], rank, dtype_bytes=dtype_bytes)
        part, *rest = parameter.name.split(".")
        moe = spec.layers[int(rest[0])].moe if part == "layers" else None
        if moe is not None and parameter.num_experts:
            share = moe.num_chosen / moe.num_experts
            multiplications += share * parameter.num_elements(rank)
            bytes_of_experts += num_bytes
            bytes_of_chosen += share * num_bytes
        elif part == "layers":
            multiplications += parameter.num_elements(rank)
            bytes_of_all += num_bytes
        elif part == "head" or spec.tied_embeddings:
            # few tokens come to the head; an embedding that is none is looked up
            bytes_of_all += num_bytes
    seconds = LAUNCH_SECONDS * len(spec.layers)
    bytes_left = seconds * BYTES_READ - bytes_of_all
    if bytes_left <= 0:
        return 0
    computed = seconds * MULTIPLICATIONS / multiplications
    # as if each token chose others, until all are read
    return computed if bytes_of_experts <= bytes_left else min(computed, bytes_left / bytes_of_chosen)


def graph_bytes(spec: ModelSpec, captured: CapturedSizes, *, dtype_bytes: int) -> int:
    """The graphs of these steps, at most: an estimate, not measured on a device.

    They share one pool, which holds the activations of the largest step; as they are captured in any order, twice
    that. Beside it each holds its launches.
    """
    pool = 2 * activation_bytes(spec, max_num_tokens=captured.max_tokens, max_num_logits=0, dtype_bytes=dtype_bytes)
    if has_quantized_kernels(on_cpu=False, dtype_bytes=dtype_bytes):
        pool += dequantized_bytes(spec, dtype_bytes=dtype_bytes)
    num_graphs = DECODE_KINDS * len(captured.rows) + len(captured.tokens)
    return pool + LAUNCHES_PER_LAYER * len(spec.layers) * num_graphs * LAUNCH_BYTES


def _up_to(most: int, sizes: Sequence[int]) -> Sequence[int]:
    """As few of them as hold up to `most`."""
    return sizes[: sum(size < most for size in sizes) + 1]
