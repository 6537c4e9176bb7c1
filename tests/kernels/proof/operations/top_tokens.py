"""The proof of `top_tokens` in Triton."""

from collections.abc import Iterator

import torch

from llmd_kernels.top_tokens import cost, reference, triton_ops
from tests.kernels.proof.checks import Case, Configuration, Proof, Rows
from tests.kernels.proof.inputs import FLOATS, apart, dtype_name, meta, randn

OUTPUTS = ("top_values", "top_ids")
# Vocabularies of SmolLM2, Llama 3, Qwen3 and Gemma 3.
VOCAB_SIZES = (49152, 128256, 151936, 262144)


def cases() -> Iterator[Case]:
    """Rounded logits: many are equal, and everywhere the lower id comes first."""
    for dtype in FLOATS:
        for num_rows, num_tokens, k in ((0, 10, 3), (2, 10, 0), (1, 1, 1), (3, 3, 3), (2, 40, 5)):
            yield Case(
                f"{dtype_name(dtype)} {k} of {num_rows}×{num_tokens}",
                {"logits": (randn(num_rows, num_tokens) * 2).round().to(dtype), "k": k},
                outputs=OUTPUTS if num_rows and k else (),
            )
    yield Case("more than are looked for one after another", {"logits": randn(2, 40).round(), "k": 33})
    yield Case("zeros of both signs", {"logits": torch.tensor([[0.0, -0.0] * 4, [-0.0, 0.0] * 4]), "k": 3})
    nothing = torch.full((2, 4200), -torch.inf)
    nothing[0, 7] = nothing[1, 4199] = 1.0
    yield Case("hardly any token", {"logits": nothing, "k": 3}, outputs=OUTPUTS)
    yield Case("rows apart", {"logits": apart(randn(3, 40).bfloat16()), "k": 4}, outputs=OUTPUTS)
    # The last chunk has fewer tokens than are wanted.
    yield Case("chunks", {"logits": randn(2, 4098), "k": 4}, outputs=OUTPUTS)
    descending = torch.arange(4200, 0, -1.0).expand(2, -1)
    yield Case("rising and falling", {"logits": torch.cat((descending[:1], descending[1:].flip(1))), "k": 5})
    yield Case(
        "logits are read once",
        {"logits": randn(2, 8192).bfloat16(), "k": 2},
        outputs=OUTPUTS,
        bytes_moved=cost.bytes_moved(2, 8192, 2, itemsize=2),
    )


def rows(num_tokens: int, k: int) -> Rows:
    logits = (randn(9, num_tokens) * 8).round()
    return Rows(f"{k} of {num_tokens}", len(logits), lambda ids: triton_ops.top_tokens(logits[ids], k))


def configurations() -> Iterator[Configuration]:
    for num_tokens in VOCAB_SIZES:
        for k in (1, 5, 20, triton_ops.MAX_K):
            for dtype in FLOATS:

                def call(num_tokens: int = num_tokens, k: int = k, dtype: torch.dtype = dtype) -> None:
                    triton_ops.top_tokens(meta(64, num_tokens, dtype=dtype), k)

                # The second kernel loads the k entries of each 4,096 logits, once; k is any number.
                yield Configuration(
                    f"{dtype_name(dtype)} {k} of {num_tokens}", call, narrow={"top_of_chunks_kernel": 0.0}
                )


PROOF = Proof(
    triton_ops.top_tokens, reference.top_tokens, list(cases()), [rows(40, 5), rows(4200, 3)], list(configurations())
)
