"""The truth of `token_logprobs`: log-softmax in float64, a stable sort, one row at a time."""

import torch
from torch import Tensor

from llmd_kernels.token_logprobs.result import TokenLogprobs


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
