"""The proof of `token_logprobs_on_device` in Triton."""

from collections.abc import Iterator

import torch

from llmd_kernels.token_logprobs import cost, reference, triton_ops
from tests.kernels.proof.checks import Case, Configuration, Proof, Rows
from tests.kernels.proof.inputs import FLOATS, apart, dtype_name, meta, randn
from tests.kernels.proof.operations.top_tokens import VOCAB_SIZES

OUTPUTS = ("logprobs", "largest_logits", "log_masses", "ranks")


def some_tokens(num_rows: int, num_tokens: int) -> torch.Tensor:
    """The first, the last, and others."""
    return torch.arange(num_rows) * (num_tokens - 1) % num_tokens


def case(name: str, logits: torch.Tensor, num_top: int = 0, bytes_moved: int | None = None) -> Case:
    arguments = {"logits": logits, "token_ids": some_tokens(*logits.shape), "num_top": num_top}
    return Case(name, arguments, outputs=OUTPUTS if len(logits) else (), bytes_moved=bytes_moved)


def cases() -> Iterator[Case]:
    """Rounded logits: many are equal, and the lower ids are ahead."""
    for dtype in FLOATS:
        for num_rows, num_tokens, num_top in ((0, 10, 2), (1, 1, 1), (3, 3, 3), (5, 40, 0), (2, 50, 4)):
            logits = (randn(num_rows, num_tokens) * 2).round().to(dtype)
            yield case(f"{dtype_name(dtype)} {num_rows}×{num_tokens}, {num_top} beside it", logits, num_top)
    yield case("all are equal", torch.full((3, 30), -2.5), 3)
    huge = torch.tensor([[3e4, -3e4, 3e4, 2.9e4], [-3e4, -3e4, -2.9e4, -3e4]])
    yield case("huge", huge, 2)
    yield case("rows apart", apart(randn(3, 40).bfloat16()), 2)
    wide = randn(4, 4200) * 4
    # A chunk in which no token is possible.
    wide[1, 4096:] = wide[2, :4096] = -torch.inf
    yield case("chunks", wide, 2)
    yield case("logits are read once", randn(2, 8192).bfloat16(), bytes_moved=cost.bytes_moved(2, 8192, itemsize=2))


def rows(num_tokens: int, num_top: int) -> Rows:
    logits, token_ids = randn(9, num_tokens) * 4, some_tokens(9, num_tokens)

    def run(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return triton_ops.token_logprobs_on_device(logits[ids], token_ids[ids], num_top)

    return Rows(f"{num_tokens}, {num_top} beside it", len(logits), run)


def configurations() -> Iterator[Configuration]:
    for num_tokens in VOCAB_SIZES:
        for dtype in FLOATS:

            def call(num_tokens: int = num_tokens, dtype: torch.dtype = dtype) -> None:
                triton_ops.token_logprobs_on_device(
                    meta(64, num_tokens, dtype=dtype), meta(64, dtype=torch.int64), num_top=0
                )

            # The second kernel loads three numbers for each 4,096 logits, once. Those beside it: `top_tokens`.
            yield Configuration(f"{dtype_name(dtype)} {num_tokens}", call, narrow={"row_kernel": 0.0})


PROOF = Proof(
    triton_ops.token_logprobs_on_device,
    reference.token_logprobs_on_device,
    list(cases()),
    [rows(40, 3), rows(4200, 0)],
    list(configurations()),
)
