"""Which experts a token goes to, and with what weights."""

from typing import Literal

from torch import Tensor

from llmd_kernels.dispatch import uses_triton
from llmd_kernels.route import torch_ops


def route(
    logits: Tensor,
    *,
    num_chosen: int,
    scoring: Literal["softmax", "sigmoid"],
    renormalize: bool,
    scale: float = 1.0,
    choice_bias: Tensor | None = None,
    num_groups: int = 1,
    num_chosen_groups: int = 1,
    group_score: Literal["max", "top2"] = "max",
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """logits [T, E] → (expert_ids [T, num_chosen] int32, weights [T, num_chosen] float32), best first; any T, also 0.

    An expert's score is the softmax over all experts or the sigmoid of its logit. Chosen are those of the greatest
    score + choice_bias ([E]), of equal ones that of the lower id, within the num_chosen_groups best of num_groups equal
    groups of neighbours; a group is worth its best expert ("max") or its two best together ("top2"). A weight is the
    score without the bias; `renormalize` divides a token's weights by their sum; then they are multiplied by `scale`.
    The chosen ids of a token are always different experts that exist, also where logits are not numbers.
    slots [T] int64: tokens without one (−1) only fill a batch up. They go to no expert: ids −1, weights 0.
    Raises ValueError for numbers that do not fit together.
    """
    num_experts = logits.shape[1]
    _check(num_experts, num_chosen, num_groups, num_chosen_groups, group_score)
    arguments = (
        num_chosen,
        scoring,
        renormalize,
        scale,
        choice_bias,
        num_groups,
        num_chosen_groups,
        group_score,
        slots,
    )
    if uses_triton(logits):
        from llmd_kernels.route import triton_ops

        return triton_ops.route(logits, *arguments)
    return torch_ops.route(logits, *arguments)


def _check(num_experts: int, num_chosen: int, num_groups: int, num_chosen_groups: int, group_score: str) -> None:
    if num_experts % num_groups:
        raise ValueError(f"{num_experts} experts cannot be cut into {num_groups} equal groups")
    if not 1 <= num_chosen_groups <= num_groups:
        raise ValueError(f"{num_chosen_groups} of {num_groups} groups cannot be chosen")
    size = num_experts // num_groups
    if not 1 <= num_chosen <= num_chosen_groups * size:
        raise ValueError(f"{num_chosen} experts cannot be chosen from {num_chosen_groups} groups of {size}")
    if group_score == "top2" and size < 2:
        raise ValueError("a group of one expert has no two best: use group_score='max'")
