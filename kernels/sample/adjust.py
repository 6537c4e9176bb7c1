"""What is done to logits before the temperature: mask, min_tokens, logit_bias, penalties. In this order."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from llmd_kernels.sample.batch import RowSampling, SamplingBatch


def adjusted(logits: Tensor, batch: SamplingBatch, mask: Tensor | None) -> Tensor:
    """logits [R, V] → the same tensor where no row asks for anything, else a changed copy."""
    rows = [r for r in range(len(batch)) if _asks(batch.sampling[r], batch.position(r))]
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    elif rows:
        logits = logits.clone()
    for r in rows:
        sampling, row = batch.sampling[r], logits[r]
        if batch.position(r) < sampling.min_tokens:
            row[_ids(sampling.stop_token_ids, row)] = float("-inf")
        _add(row, sampling.logit_bias)
        _penalize(row, sampling, batch.token_ids[r], batch.num_prompt_tokens[r])
    return logits


def _asks(sampling: RowSampling, position: int) -> bool:
    return (
        bool(sampling.logit_bias)
        or (position < sampling.min_tokens and bool(sampling.stop_token_ids))
        or sampling.repetition_penalty != 1
        or sampling.frequency_penalty != 0
        or sampling.presence_penalty != 0
    )


def _penalize(row: Tensor, sampling: RowSampling, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
    """In place. Repetition looks at prompt and output, the other two at the output."""
    if sampling.repetition_penalty != 1:
        seen = _ids(set(token_ids), row)
        score = row[seen]
        row[seen] = torch.where(score > 0, score / sampling.repetition_penalty, score * sampling.repetition_penalty)
    if sampling.frequency_penalty != 0 or sampling.presence_penalty != 0:
        counts = Counter(token_ids[num_prompt_tokens:])
        penalties = {i: -n * sampling.frequency_penalty - sampling.presence_penalty for i, n in counts.items()}
        _add(row, penalties)


def _add(row: Tensor, changes: Mapping[int, float]) -> None:
    """Token id → what is added to its logit, in place."""
    row[_ids(changes, row)] += torch.tensor(list(changes.values()), dtype=row.dtype, device=row.device)


def _ids(token_ids: Collection[int], row: Tensor) -> Tensor:
    return torch.tensor(list(token_ids), dtype=torch.int64, device=row.device)
