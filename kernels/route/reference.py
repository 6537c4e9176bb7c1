"""The truth of `route`: sorting, token by token. Any float dtype."""

from typing import Literal

import torch
from torch import Tensor


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
    """Scores, the best groups, their best experts, the weights of these."""
    scores = torch.softmax(logits, dim=-1) if scoring == "softmax" else torch.sigmoid(logits)
    expert_ids, weights = [], []
    for token, token_scores in enumerate(scores):
        if slots is not None and slots[token] < 0:
            expert_ids.append([-1] * num_chosen)
            weights.append(logits.new_zeros(num_chosen))
            continue
        choice = (token_scores if choice_bias is None else token_scores + choice_bias).tolist()
        size = len(choice) // num_groups
        groups = [range(group * size, (group + 1) * size) for group in range(num_groups)]
        num_scored = 1 if group_score == "max" else 2
        worth = [sum(sorted((choice[e] for e in group), reverse=True)[:num_scored]) for group in groups]
        # sorted() keeps the order of equal ones: the lower id comes first.
        best_groups = sorted(range(num_groups), key=lambda group: -worth[group])[:num_chosen_groups]
        candidates = sorted(e for group in best_groups for e in groups[group])
        chosen = sorted(candidates, key=lambda e: -choice[e])[:num_chosen]
        chosen_scores = token_scores[chosen]
        if renormalize:
            chosen_scores = chosen_scores / chosen_scores.sum()
        expert_ids.append(chosen)
        weights.append(chosen_scores * scale)
    if not expert_ids:
        return torch.empty(0, num_chosen, dtype=torch.int32), logits.new_empty(0, num_chosen)
    return torch.tensor(expert_ids, dtype=torch.int32), torch.stack(weights)
