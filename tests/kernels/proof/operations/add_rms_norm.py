"""The proof of `add_rms_norm` in Triton."""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmd_kernels.add_rms_norm import cost, reference, triton_ops
from tests.kernels.proof.checks import Case, Configuration, Proof, Rows
from tests.kernels.proof.inputs import FLOATS, apart, dtype_name, meta, randn


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        for num_tokens, hidden_size in ((0, 64), (1, 1), (3, 16), (5, 100), (2, 576), (7, 128), (3, 5000)):
            is_even = hidden_size * num_tokens >= 1000
            yield Case(
                f"{dtype_name(dtype)} {num_tokens}×{hidden_size}",
                {
                    "x": randn(num_tokens, hidden_size, dtype=dtype),
                    "residual": randn(num_tokens, hidden_size, dtype=dtype, seed=2) * 5,
                    "weight": randn(hidden_size, dtype=dtype, seed=1),
                    "eps": 1e-5,
                    "weight_offset": float(num_tokens % 2),
                },
                outputs=["normed", "new_residual"] if num_tokens else [],
                bytes_moved=cost.bytes_moved(num_tokens, hidden_size, itemsize=dtype.itemsize) if is_even else None,
                shared_inputs=["weight"],
            )
    x, residual = randn(4, 72).bfloat16(), apart(randn(4, 72, seed=1).bfloat16())
    yield Case("rows apart", {"x": x, "residual": residual, "weight": randn(72, seed=2), "eps": 1e-6})


def rows(hidden_size: int) -> Rows:
    x, residual = randn(13, hidden_size).bfloat16(), randn(13, hidden_size, seed=2).bfloat16()
    weight = randn(hidden_size, seed=1).bfloat16()

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        return triton_ops.add_rms_norm(x[ids], residual[ids], weight, 1e-5)

    return Rows(f"hidden {hidden_size}", len(x), run)


def configurations() -> Iterator[Configuration]:
    for hidden_size in (576, 1024, 2048, 3072, 4096, 8192, 16384):
        for dtype in FLOATS:

            def call(hidden_size: int = hidden_size, dtype: torch.dtype = dtype) -> None:
                x, residual = meta(64, hidden_size, dtype=dtype), meta(64, hidden_size, dtype=dtype)
                triton_ops.add_rms_norm(x, residual, meta(hidden_size, dtype=dtype), 1e-5)

            yield Configuration(f"{dtype_name(dtype)} {hidden_size}", call)


PROOF = Proof(
    triton_ops.add_rms_norm,
    reference.add_rms_norm,
    list(cases()),
    [rows(100), rows(1000)],
    list(configurations()),
)
