"""`route` from operators whose bits do not depend on the other rows (see gated_mul for which do)."""

from typing import Literal

import torch
from torch import Tensor

# Added to a sum of weights: scores that all are zero stay zero.
TINY = 1e-20


def route(
    logits: Tensor,
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
    """Computed in float32."""
    logits = logits.float()
    scores = torch.softmax(logits, dim=-1) if scoring == "softmax" else 1 / torch.neg(logits).exp_().add_(1)
    choice = _choice(logits, scores, choice_bias, num_groups, group_score)
    if num_groups > num_chosen_groups:
        choice = _within_best_groups(choice, num_groups, num_chosen_groups, group_score)
    expert_ids = _best(choice, num_chosen)
    weights = scores.gather(1, expert_ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
    expert_ids, weights = expert_ids.int(), weights * scale
    if slots is not None:
        is_padding = (slots < 0)[:, None]
        expert_ids, weights = expert_ids.masked_fill_(is_padding, -1), weights.masked_fill_(is_padding, 0)
    return expert_ids, weights


def _choice(logits: Tensor, scores: Tensor, choice_bias: Tensor | None, num_groups: int, group_score: str) -> Tensor:
    """What experts are compared by: logits where they have the order of the scores, for they are not rounded."""
    if choice_bias is not None:
        choice = scores + choice_bias.float()
    else:
        choice = logits if num_groups == 1 or group_score == "max" else scores
    return choice.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _within_best_groups(choice: Tensor, num_groups: int, num_chosen_groups: int, group_score: str) -> Tensor:
    """−∞ for the experts of all other groups."""
    num_tokens, num_experts = choice.shape
    grouped = choice.view(num_tokens, num_groups, num_experts // num_groups)
    worth = grouped.topk(1 if group_score == "max" else 2).values.sum(dim=-1)
    is_out = torch.ones(num_tokens, num_groups, dtype=torch.bool, device=choice.device)
    is_out.scatter_(1, _best(worth, num_chosen_groups), False)
    return grouped.masked_fill(is_out[:, :, None], -torch.inf).reshape(num_tokens, num_experts)


def _best(numbers: Tensor, count: int) -> Tensor:
    """[T, N] → where the `count` greatest are, greatest first, of equal ones the first; [T, count] int64."""
    return numbers.sort(dim=-1, descending=True, stable=True).indices[:, :count]
