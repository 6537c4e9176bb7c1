"""`token_logprobs` with PyTorch operators, a few rows at a time; sums in float64."""

import torch
from torch import Tensor

from llmd_kernels.token_logprobs.result import DeviceLogprobs, TokenLogprobs
from llmd_kernels.top_tokens import reference as top_tokens_reference
from llmd_kernels.top_tokens import top_tokens

# Rows widened to float64 at a time: bounds the temporary memory.
SLAB_ROWS = 32


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> list[TokenLogprobs]:
    """Slab by slab."""
    starts = range(0, len(logits), SLAB_ROWS)
    slabs = [(logits[start : start + SLAB_ROWS], token_ids[start : start + SLAB_ROWS]) for start in starts]
    return [result for slab in slabs for result in _slab(*slab, num_top)]


def token_logprobs_on_device(logits: Tensor, token_ids: Tensor, num_top: int) -> DeviceLogprobs:
    """Whole rows are sorted: what looks at ties only where there are some would have to read them back."""
    wide = logits.double()
    chosen = wide.gather(1, token_ids[:, None])
    ids = torch.arange(logits.shape[1], device=logits.device)
    before = (wide > chosen) | ((wide == chosen) & (ids < token_ids[:, None]))
    top_values, top_ids = top_tokens_reference.top_tokens(wide, num_top)
    largest = wide.amax(dim=1, keepdim=True)
    log_total = row_sums((wide - largest).exp_()).log_()[:, None] + largest
    return DeviceLogprobs(
        token_ids=token_ids,
        logprobs=(chosen - log_total)[:, 0].float(),
        ranks=(before.sum(dim=1) + 1).int(),
        top_ids=top_ids,
        top_logprobs=(top_values - log_total).float(),
    )


def _slab(logits: Tensor, token_ids: Tensor, num_top: int) -> list[TokenLogprobs]:
    chosen = logits.gather(1, token_ids[:, None])
    ids = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > chosen) | ((logits == chosen) & (ids < token_ids[:, None]))
    ranks = before.count_nonzero(dim=1) + 1
    top_values, top_ids = top_tokens(logits, num_top)
    largest = logits.amax(dim=1, keepdim=True).double()
    log_total = row_sums((logits.double() - largest).exp_()).log_()[:, None] + largest
    columns = (token_ids, chosen[:, 0] - log_total[:, 0], ranks, top_ids, top_values - log_total)
    return [TokenLogprobs(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def row_sums(x: Tensor) -> Tensor:
    """x [R, V] → [R]. A lone row is summed beside itself: PyTorch splits a sum with one result over the threads."""
    return x.sum(dim=1) if x.shape[0] > 1 else x.expand(2, -1).sum(dim=1)[: x.shape[0]]
