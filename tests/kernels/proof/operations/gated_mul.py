"""The proof of `gated_mul` in Triton."""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from llmd_kernels.gated_mul import cost, reference, triton_ops
from tests.kernels.proof.checks import Case, Configuration, Proof, Rows
from tests.kernels.proof.inputs import FLOATS, apart, dtype_name, meta, randn

Activation = Literal["silu", "gelu_tanh", "gelu", "clamped_silu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def cases() -> Iterator[Case]:
    for activation in ACTIVATIONS:
        for dtype in FLOATS:
            for num_tokens, size in ((0, 64), (1, 1), (3, 100), (2, 2500)):
                yield Case(
                    f"{activation} {dtype_name(dtype)} {num_tokens}×{size}",
                    {"gate_up": randn(num_tokens, 2 * size, dtype=dtype) * 4, "activation": activation},
                    outputs=["y"] if num_tokens else [],
                    bytes_moved=cost.bytes_moved(num_tokens, size, itemsize=dtype.itemsize) if num_tokens else None,
                )
        far = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4]])
        yield Case(f"{activation} far out", {"gate_up": torch.cat([far, far + 1], 1), "activation": activation})
        gate_up = apart(randn(3, 48).bfloat16())
        yield Case(f"{activation} rows apart", {"gate_up": gate_up, "activation": activation})


def rows(activation: Activation) -> Rows:
    gate_up = randn(11, 600).bfloat16()

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        return (triton_ops.gated_mul(gate_up[ids], activation),)

    return Rows(activation, len(gate_up), run)


def configurations() -> Iterator[Configuration]:
    for activation in ACTIVATIONS:
        for dtype in FLOATS:
            for size in (1536, 14336):

                def call(size: int = size, dtype: torch.dtype = dtype, activation: Activation = activation) -> None:
                    triton_ops.gated_mul(meta(64, 2 * size, dtype=dtype), activation)

                yield Configuration(f"{activation} {dtype_name(dtype)} {size}", call)


PROOF = Proof(
    triton_ops.gated_mul,
    reference.gated_mul,
    list(cases()),
    [rows(activation) for activation in ACTIVATIONS],
    list(configurations()),
)
