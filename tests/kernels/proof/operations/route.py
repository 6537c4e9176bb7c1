"""The proof of `route` in Triton."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmd_kernels.route import cost, reference, triton_ops
from tests.kernels.proof.checks import Case, Configuration, Proof, Rows
from tests.kernels.proof.inputs import FLOATS, apart, dtype_name, meta, randn

SOFTMAX = {"scoring": "softmax", "renormalize": True}
V2 = {"scoring": "softmax", "renormalize": False, "scale": 16.0, "group_score": "max"}
V3 = {"scoring": "sigmoid", "renormalize": True, "scale": 2.5, "group_score": "top2"}
# (experts, chosen, groups, chosen groups, the rest) of Mixtral-8x7B, Qwen3-30B-A3B, gpt-oss-20b, Qwen3-Next-80B,
# DeepSeek-V2 and V3.
SHIPPED: dict[str, tuple[int, dict[str, Any]]] = {
    "Mixtral-8x7B": (8, {"num_chosen": 2, **SOFTMAX}),
    "Qwen3-30B-A3B": (128, {"num_chosen": 8, **SOFTMAX}),
    "gpt-oss-20b": (32, {"num_chosen": 4, **SOFTMAX}),
    "Qwen3-Next-80B": (512, {"num_chosen": 10, **SOFTMAX}),
    "DeepSeek-V2": (160, {"num_chosen": 6, "num_groups": 8, "num_chosen_groups": 3, **V2}),
    "DeepSeek-V3": (256, {"num_chosen": 8, "num_groups": 8, "num_chosen_groups": 4, "choice_bias": True, **V3}),
}
# The same ways to choose among a few.
SMALL: dict[str, tuple[int, dict[str, Any]]] = {
    "softmax": (6, {"num_chosen": 3, **SOFTMAX}),
    "sigmoid": (9, {"num_chosen": 2, "scoring": "sigmoid", "renormalize": False}),
    "groups": (15, {"num_chosen": 4, "num_groups": 5, "num_chosen_groups": 2, **V2}),
    "two best": (24, {"num_chosen": 5, "num_groups": 3, "num_chosen_groups": 2, "choice_bias": True, **V3}),
}


def with_bias(arguments: dict[str, Any], bias: Tensor) -> dict[str, Any]:
    return arguments | {"choice_bias": bias} if arguments.get("choice_bias") else arguments


def cases() -> Iterator[Case]:
    for name, (num_experts, arguments) in SMALL.items():
        bias = randn(num_experts, seed=1) * 0.05
        for num_tokens, dtype in ((0, torch.bfloat16), (3, torch.bfloat16), (5, torch.float16), (131, torch.float32)):
            logits = randn(num_tokens, num_experts, dtype=dtype)
            outputs = ["expert_ids", "weights"] if num_tokens else []
            yield Case(
                f"{name} {dtype_name(dtype)} {num_tokens}×{num_experts}",
                {"logits": logits, **with_bias(arguments, bias)},
                outputs=outputs,
            )
        padded = {"logits": randn(6, num_experts), "slots": torch.tensor([5, 0, -1, 3, -1, -1])}
        yield Case(f"{name} padding", {**padded, **with_bias(arguments, bias)}, outputs=["expert_ids", "weights"])
        ties = torch.tensor([0.0, -0.0, 1.0, 1.0])[torch.arange(7 * num_experts).view(7, -1) * 5 % 4]
        yield Case(f"{name} ties", {"logits": ties, **arguments, "choice_bias": None})
    num_experts, arguments = SHIPPED["Qwen3-30B-A3B"]
    moved = cost.bytes_moved(20, num_experts, 8, itemsize=2)
    yield Case("moves", {"logits": randn(20, num_experts).bfloat16(), **arguments}, bytes_moved=moved)
    yield Case("rows apart", {"logits": apart(randn(3, num_experts)), **arguments})


def rows(name: str) -> Rows:
    num_experts, arguments = SMALL[name]
    logits, arguments = randn(150, num_experts), with_bias(arguments, randn(num_experts, seed=1))
    return Rows(name, len(logits), lambda ids: triton_ops.route(logits[ids], **arguments))


def configurations() -> Iterator[Configuration]:
    for name, (num_experts, arguments) in SHIPPED.items():
        for dtype in FLOATS:

            def call(
                num_experts: int = num_experts, arguments: dict[str, Any] = arguments, dtype: torch.dtype = dtype
            ) -> None:
                bias = meta(num_experts, dtype=torch.float32)
                slots = meta(64, dtype=torch.int64)
                triton_ops.route(meta(64, num_experts, dtype=dtype), **with_bias(arguments, bias), slots=slots)

            # A few rows of some hundred numbers, once a program, and no loop: what counts is the launch.
            yield Configuration(f"{name} {dtype_name(dtype)}", call, narrow={"route_kernel": 0.0})


PROOF = Proof(triton_ops.route, reference.route, list(cases()), [rows(name) for name in SMALL], list(configurations()))
