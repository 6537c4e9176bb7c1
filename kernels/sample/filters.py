"""Which tokens top_k, top_p and min_p leave, worked out among the most likely ones. In float64."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmd_kernels.sample.batch import RowSampling
from llmd_kernels.token_logprobs.torch_ops import row_sums
from llmd_kernels.top_tokens import top_tokens


@dataclass(frozen=True, slots=True)
class Candidates:
    """The most likely tokens of each row, most likely first."""

    ids: Tensor  # [R, K] int64
    scaled: Tensor  # [R, K] float64: (logit - largest logit) / temperature
    kept: Tensor  # [R, K] bool: survives the filters
    complete: Tensor  # [R] bool: no token outside the candidates survives

    def __getitem__(self, rows: Tensor) -> "Candidates":
        return Candidates(self.ids[rows], self.scaled[rows], self.kept[rows], self.complete[rows])


def survivors(scores: Tensor, rows: list[RowSampling], num_candidates: int) -> Candidates:
    """scores [R, V]: adjusted logits. Rows that are not complete want more candidates; all V are always complete."""
    num_tokens = scores.shape[1]
    # At least top_k, whose total top_p is a part of.
    num_candidates = min(max(num_candidates, *(s.top_k for s in rows)), num_tokens)
    temperature, top_k, top_p, min_p = (
        torch.tensor(column, dtype=torch.float64, device=scores.device)[:, None]
        for column in zip(*((s.temperature, s.top_k or num_tokens, s.top_p, s.min_p) for s in rows), strict=True)
    )
    values, ids = top_tokens(scores, num_candidates)
    largest = values[:, :1].double()
    scaled = (values.double() - largest) / temperature
    weights = scaled.exp()
    reached = weights.cumsum(dim=1)
    total = reached.gather(1, top_k.long().clamp(max=num_candidates) - 1)
    if any(s.top_p < 1 and (s.top_k or num_tokens) > num_candidates for s in rows):
        of_all = row_sums((scores.double() - largest).div_(temperature).exp_())[:, None]
        total = torch.where(top_k > num_candidates, of_all, total)
    # A token stays if those before it have not reached top_p: the one that crosses is kept.
    reached_before = F.pad(reached[:, :-1], (1, 0))
    kept = (
        (torch.arange(num_candidates, device=scores.device) < top_k)
        & ((top_p >= 1) | (reached_before < top_p * total))
        & (weights >= min_p)
        & (values > float("-inf"))
    )
    # The survivors are always the first ones.
    complete = (top_k[:, 0] <= num_candidates) | ~kept[:, -1] | (num_candidates == num_tokens)
    return Candidates(ids, scaled, kept, complete)
