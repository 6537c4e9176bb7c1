"""The proof of `scale_logits` in Triton."""

from collections.abc import Iterator

import torch

from llmd_kernels.scale_logits import cost, reference, triton_ops
from tests.kernels.proof.checks import Case, Configuration, Proof
from tests.kernels.proof.inputs import FLOATS, apart, dtype_name, meta, randn


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        for num_rows, num_tokens in ((0, 8), (1, 3), (3, 700), (2, 1024)):
            yield Case(
                f"{dtype_name(dtype)} {num_rows}×{num_tokens}",
                {
                    "products": randn(num_rows, num_tokens, dtype=dtype) * 9,
                    "divisor": 1.0 if num_rows == 1 else 0.75,
                    "soft_cap": None if num_rows == 3 else 5.0,
                },
                outputs=["logits"],
                bytes_moved=cost.bytes_moved(num_rows, num_tokens, itemsize=dtype.itemsize) if num_rows > 1 else None,
            )
    yield Case("rows apart", {"products": apart(randn(3, 40)), "divisor": 3.0})


def configurations() -> Iterator[Configuration]:
    for dtype in FLOATS:

        def call(dtype: torch.dtype = dtype) -> None:
            triton_ops.scale_logits(meta(64, 128256, dtype=dtype), divisor=2.0, soft_cap=30.0)

        yield Configuration(f"{dtype_name(dtype)} 128256", call)


PROOF = Proof(triton_ops.scale_logits, reference.scale_logits, list(cases()), [], list(configurations()))
