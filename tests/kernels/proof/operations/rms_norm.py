"""The proof of `rms_norm` in Triton."""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmd_kernels.rms_norm import cost, reference, triton_ops
from tests.kernels.proof.checks import Case, Configuration, Proof, Rows
from tests.kernels.proof.inputs import FLOATS, apart, dtype_name, meta, randn


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        for num_tokens, hidden_size in ((0, 64), (1, 1), (3, 16), (5, 100), (2, 576), (9, 128), (1, 4096), (3, 5000)):
            is_even = hidden_size * num_tokens >= 1000
            yield Case(
                f"{dtype_name(dtype)} {num_tokens}×{hidden_size}",
                {
                    "x": randn(num_tokens, hidden_size, dtype=dtype) * 3,
                    "weight": randn(hidden_size, dtype=dtype, seed=1),
                    "eps": 1e-5,
                    "weight_offset": float(num_tokens % 2),
                },
                outputs=["y"] if num_tokens else [],
                bytes_moved=cost.bytes_moved(num_tokens, hidden_size, itemsize=dtype.itemsize) if is_even else None,
                shared_inputs=["weight"],
            )
    weight = randn(72, dtype=torch.float32, seed=1)
    yield Case("rows apart, weight wider", {"x": apart(randn(4, 72).bfloat16()), "weight": weight, "eps": 1e-6})
    yield Case("heads", {"x": randn(2, 3, 72).half(), "weight": weight, "eps": 1e-6})
    zeros = torch.zeros(2, 64).bfloat16()
    yield Case("zeros", {"x": zeros, "weight": weight[:64].clone(), "eps": 1e-6})


def rows(hidden_size: int) -> Rows:
    x, weight = randn(13, hidden_size).bfloat16(), randn(hidden_size, seed=1).bfloat16()

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        return (triton_ops.rms_norm(x[ids], weight, 1e-5),)

    return Rows(f"hidden {hidden_size}", len(x), run)


def configurations() -> Iterator[Configuration]:
    for hidden_size in (64, 128, 576, 1024, 2048, 3072, 4096, 8192, 16384):
        for dtype in FLOATS:

            def call(hidden_size: int = hidden_size, dtype: torch.dtype = dtype) -> None:
                triton_ops.rms_norm(meta(64, hidden_size, dtype=dtype), meta(hidden_size, dtype=dtype), 1e-5)

            # The weights of a short row, which all rows of a program share, are fewer than one wide load of a warp.
            yield Configuration(
                f"{dtype_name(dtype)} {hidden_size}", call, vector_share=0.9 if hidden_size > 128 else 0.8
            )


PROOF = Proof(
    triton_ops.rms_norm,
    reference.rms_norm,
    list(cases()),
    [rows(100), rows(1000)],
    list(configurations()),
)
