"""The proof of `experts` in Triton."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmd_kernels.experts import cost, reference, triton_ops
from llmd_kernels.quantized_linear.weights import QuantizedWeight
from tests.kernels.proof.checks import Case, Configuration, Proof, Rows
from tests.kernels.proof.compiler import MATRIX_OF_ONE_DEPTH
from tests.kernels.proof.inputs import FLOATS, apart, dtype_name, meta, randn
from tests.kernels.proof.operations.quantized_linear import (
    float4_weight,
    float8_weight,
    int_weight,
    meta_float4_weight,
    meta_float8_weight,
    meta_int_weight,
)

# (hidden size, intermediate size, experts, chosen, activation) of Mixtral-8x7B, Qwen3-30B-A3B, gpt-oss-20b.
SHIPPED = {
    "Mixtral-8x7B": (4096, 14336, 8, 2, "silu"),
    "Qwen3-30B-A3B": (2048, 768, 128, 8, "silu"),
    "gpt-oss-20b": (2880, 2880, 32, 4, "clamped_silu"),
}
NUM_TOKENS = (1, 16, 64, 256, 1024, 4096)
DOWN = int_weight(4 * 64, 32, bits=4)
# Which expert each token chose: a few integers a token, one a thread.
NARROW = {"group_kernel": 0.0}


def stacks(
    num_experts: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype, *, has_bias: bool = False
) -> dict[str, Any]:
    """Weights of one layer."""
    gate_up = randn(num_experts, 2 * intermediate_size, hidden_size, seed=1) / hidden_size**0.5
    down = randn(num_experts, hidden_size, intermediate_size, seed=2) / intermediate_size**0.5
    return {
        "gate_up": gate_up.to(dtype),
        "down": down.to(dtype),
        "activation": "clamped_silu" if has_bias else "silu",
        "gate_up_bias": randn(num_experts, 2 * intermediate_size, dtype=dtype, seed=3) if has_bias else None,
        "down_bias": randn(num_experts, hidden_size, dtype=dtype, seed=4) if has_bias else None,
    }


def quantized_stacks() -> Iterator[tuple[str, tuple[int, int, int], dict[str, QuantizedWeight]]]:
    """(name, (experts, hidden size, intermediate size), weights) of every kind; experts that end within a tile."""
    yield "int4", (3, 128, 40), {
        "gate_up": int_weight(3 * 80, 128, bits=4, num_groups=2),
        "down": int_weight(3 * 128, 40, bits=4, scale_dtype=torch.float16),
    }  # fmt: skip
    yield "int8", (3, 96, 64), {
        "gate_up": int_weight(3 * 128, 96, bits=8, num_groups=3),
        "down": int_weight(3 * 96, 64, bits=8, has_zeros=False),
    }  # fmt: skip
    yield "float8 in blocks", (3, 256, 128), {
        "gate_up": float8_weight(3 * 256, 256, (128, 128)),
        "down": float8_weight(3 * 256, 128, (128, 128)),
    }  # fmt: skip
    yield "float8, a scale for each matrix", (3, 72, 40), {
        "gate_up": float8_weight(3 * 80, 72, (40, 72)),
        "down": float8_weight(3 * 72, 40, (72, 40)),
    }  # fmt: skip
    yield "float4", (3, 96, 32), {"gate_up": float4_weight(3 * 64, 96), "down": float4_weight(3 * 96, 32)}
    # no kernel unpacks blocks of 24 inputs
    yield "float8, odd blocks", (3, 72, 48), {
        "gate_up": float8_weight(3 * 96, 72, (8, 24)),
        "down": float8_weight(3 * 72, 48, (1, 48)),
    }  # fmt: skip


def choices(num_tokens: int, num_experts: int, num_chosen: int) -> dict[str, Tensor]:
    """Different experts for each token, some of them much more often than others, and now and then none."""
    liked = randn(num_tokens, num_experts, seed=5) - torch.arange(num_experts) / 2
    expert_ids = liked.argsort(dim=-1, descending=True)[:, :num_chosen].int()
    expert_ids[2::4, 0] = -1
    expert_ids[5::4, -1] = num_experts + 2
    return {"expert_ids": expert_ids, "weights": randn(num_tokens, num_chosen, seed=6).abs()}


def case(
    name: str, num_tokens: int, num_chosen: int, sizes: tuple[int, int, int], dtype: torch.dtype, **options: Any
) -> Case:
    num_experts, hidden_size, _ = sizes
    has_bias = options.pop("has_bias", False)
    arguments = {
        "x": randn(num_tokens, hidden_size, dtype=dtype),
        **choices(num_tokens, num_experts, num_chosen),
        **stacks(*sizes, dtype, has_bias=has_bias),
    }
    return Case(name, arguments | options.pop("arguments", {}), **options)


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        for num_tokens, num_chosen, sizes in (
            (0, 2, (4, 64, 32)),
            (1, 1, (1, 16, 8)),
            (3, 2, (5, 100, 70)),
            (40, 3, (4, 64, 66)),
        ):
            name = f"{dtype_name(dtype)} {num_tokens} tokens, {num_chosen} of {'×'.join(map(str, sizes))}"
            yield case(name, num_tokens, num_chosen, sizes, dtype, has_bias=num_tokens % 2 == 1)
    for place, (name, sizes, layer) in enumerate(quantized_stacks()):
        dtype, has_bias = FLOATS[place % 2], place % 2 == 1
        # small ones: the tolerance is that of one rounding of numbers around 1, and here are two of larger ones
        arguments = layer | {"x": randn(5, sizes[1], dtype=dtype) / 4}
        yield case(f"{dtype_name(dtype)} {name}", 5, 2, sizes, dtype, arguments=arguments, has_bias=has_bias)
    yield case("one is quantised, one is not", 3, 2, (4, 64, 32), torch.bfloat16, arguments={"down": DOWN})
    favourite = {"expert_ids": torch.tensor([2, 2, 0] * 13, dtype=torch.int32)[:, None]}
    yield case("one is chosen by most", 39, 1, (8, 32, 16), torch.bfloat16, arguments=favourite)
    nobody = {"expert_ids": torch.full((3, 2), -1, dtype=torch.int32), "weights": torch.full((3, 2), torch.nan)}
    yield case("nobody is chosen", 3, 2, (4, 32, 16), torch.bfloat16, arguments=nobody)
    yield case("rows apart", 3, 2, (4, 32, 16), torch.bfloat16, arguments={"x": apart(randn(3, 32).bfloat16())})
    everybody = {"expert_ids": torch.tensor([[1, 3], [3, 6]], dtype=torch.int32)}
    yield case(
        "weights of who is chosen are read once",
        2,
        2,
        (8, 512, 256),
        torch.bfloat16,
        arguments=everybody,
        bytes_moved=cost.bytes_moved(2, 2, 3, 512, 256, itemsize=2),
        shared_inputs=["x", "inner", "expert_ids", "tiles", "order", "places"],
    )


def rows(
    num_tokens: int,
    num_chosen: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    quantized: dict[str, QuantizedWeight] | None = None,
) -> Rows:
    """More choices of one expert than the narrowest tile holds, so that tiles of several widths come about."""
    num_experts, hidden_size, _ = sizes
    x, layer = randn(num_tokens, hidden_size, dtype=dtype), stacks(*sizes, dtype, has_bias=True) | (quantized or {})
    chosen = choices(num_tokens, num_experts, num_chosen)

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        return (triton_ops.experts(x[ids], chosen["expert_ids"][ids], chosen["weights"][ids], **layer),)

    return Rows(f"{dtype_name(dtype)} {num_tokens} tokens, {num_chosen} of {num_experts}", num_tokens, run)


def configurations() -> Iterator[Configuration]:
    for name, sizes in SHIPPED.items():
        for num_tokens in NUM_TOKENS:
            yield Configuration(
                f"{name} {num_tokens} tokens",
                partial(_launch, *sizes, num_tokens=num_tokens, dtype=torch.bfloat16),
                narrow=NARROW,
                matrix=MATRIX_OF_ONE_DEPTH,
            )
    for name, shape, layer, vector_share in quantized_layers():
        for num_tokens in NUM_TOKENS:
            yield Configuration(
                f"{name} {num_tokens} tokens",
                partial(_launch, *SHIPPED[shape], num_tokens=num_tokens, dtype=torch.bfloat16, quantized=layer),
                narrow=NARROW,
                vector_share=vector_share,
                matrix=MATRIX_OF_ONE_DEPTH,
            )
    for num_tokens in (16, 4096):
        call = partial(_launch, *SHIPPED["gpt-oss-20b"], num_tokens=num_tokens, dtype=torch.float32)
        yield Configuration(f"float32 {num_tokens} tokens", call, narrow=NARROW)


def quantized_layers() -> Iterator[tuple[str, str, dict[str, QuantizedWeight], float]]:
    """(name, whose sizes, weights, the least part of wide loads)."""
    makers: dict[str, tuple[Callable[[int, int], QuantizedWeight], float]] = {
        "int4 by 128": (partial(meta_int_weight, bits=4, group_size=128), 0.8),
        "float8 by 128×128": (partial(meta_float8_weight, block=(128, 128)), 0.25),
        "float4": (meta_float4_weight, 0.7),
    }
    for kind, shape in (
        ("int4 by 128", "Mixtral-8x7B"),
        ("int4 by 128", "Qwen3-30B-A3B"),
        ("float8 by 128×128", "Qwen3-30B-A3B"),
        ("float4", "Qwen3-30B-A3B"),
        ("float4", "gpt-oss-20b"),
    ):
        make, vector_share = makers[kind]
        hidden, intermediate, num_experts, *_ = SHIPPED[shape]
        layer = {
            "gate_up": make(num_experts * 2 * intermediate, hidden),
            "down": make(num_experts * hidden, intermediate),
        }
        yield f"{shape}, {kind},", shape, layer, vector_share


def _launch(
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    num_chosen: int,
    activation: Any,
    *,
    num_tokens: int,
    dtype: torch.dtype,
    quantized: dict[str, QuantizedWeight] | None = None,
) -> None:
    has_bias = activation == "clamped_silu"
    layer: dict[str, Tensor | QuantizedWeight] = {
        "gate_up": meta(num_experts, 2 * intermediate_size, hidden_size, dtype=dtype),
        "down": meta(num_experts, hidden_size, intermediate_size, dtype=dtype),
    }
    layer |= quantized or {}
    triton_ops.experts(
        meta(num_tokens, hidden_size, dtype=dtype),
        meta(num_tokens, num_chosen, dtype=torch.int32),
        meta(num_tokens, num_chosen, dtype=torch.float32),
        layer["gate_up"],
        layer["down"],
        activation,
        meta(num_experts, 2 * intermediate_size, dtype=dtype) if has_bias else None,
        meta(num_experts, hidden_size, dtype=dtype) if has_bias else None,
    )


PROOF = Proof(
    triton_ops.experts,
    reference.experts,
    list(cases()),
    [
        rows(70, 2, (4, 72, 40)),
        rows(20, 3, (5, 130, 66)),
        rows(20, 2, (2, 70, 40), torch.float32),
        *(rows(30, 2, sizes, quantized=layer) for _, sizes, layer in quantized_stacks()),
    ],
    list(configurations()),
)
