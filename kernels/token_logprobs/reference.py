"""The truth of `token_logprobs`: log-softmax in float64, a stable sort, one row at a time."""

from typing import Any

import torch
from torch import Tensor

from llmd_kernels.token_logprobs.result import DeviceLogprobs, TokenLogprobs


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> list[TokenLogprobs]:
    """log p of each row's token, its rank, and the num_top most likely tokens."""
    results = []
    for row, token_id in zip(logits.double(), token_ids.tolist(), strict=True):
        logprobs = row - torch.logsumexp(row, dim=0)
        order = torch.sort(row, descending=True, stable=True).indices.tolist()
        top_ids = order[:num_top]
        results.append(
            TokenLogprobs(
                token_id=token_id,
                logprob=float(logprobs[token_id]),
                rank=order.index(token_id) + 1,
                top_ids=top_ids,
                top_logprobs=[float(logprobs[i]) for i in top_ids],
            )
        )
    return results


def token_logprobs_on_device(logits: Tensor, token_ids: Tensor, num_top: int) -> DeviceLogprobs:
    """The same as tensors, logarithms in float64."""
    rows = token_logprobs(logits, token_ids, num_top)

    def column(values: list[Any], *sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device).view(len(rows), *sizes)

    return DeviceLogprobs(
        token_ids=token_ids,
        logprobs=column([row.logprob for row in rows], dtype=torch.float64),
        ranks=column([row.rank for row in rows], dtype=torch.int32),
        top_ids=column([row.top_ids for row in rows], num_top, dtype=torch.int64),
        top_logprobs=column([row.top_logprobs for row in rows], num_top, dtype=torch.float64),
    )
