"""`sample_on_device` with PyTorch operators: whole rows are sorted, nothing is read back."""

import torch
from torch import Tensor

from llmd_kernels.sample.device import DeviceSampling
from llmd_kernels.sample.noise import gumbel_of_all
from llmd_kernels.token_logprobs.torch_ops import row_sums


def sample_on_device(logits: Tensor, sampling: DeviceSampling) -> Tensor:
    """The largest logit + temperature · noise among those that are left; argmax gives the lowest id of equal ones."""
    if logits.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    scores = adjusted(logits.float(), sampling) if sampling.adjusts else logits.float()
    drawn = noisy(
        scores,
        sampling.temperatures,
        seeds=sampling.seeds,
        choices=sampling.choices,
        positions=sampling.positions,
    )
    if sampling.filters:
        drawn = drawn.masked_fill(~kept(scores, sampling), float("-inf"))
    return drawn.argmax(dim=1)


def noisy(scores: Tensor, temperatures: Tensor, *, seeds: Tensor, choices: Tensor, positions: Tensor) -> Tensor:
    """What is compared in a draw: scores [R, V] float32 + temperature · noise, the rest [R] as in DeviceSampling."""
    noise = gumbel_of_all(seeds, positions.long(), choices.long() & 0xFFFFFFFF, scores.shape[1])
    return scores + temperatures[:, None] * noise


def adjusted(logits: Tensor, sampling: DeviceSampling) -> Tensor:
    """logits [R, V] float32 → scores [R, V]: bitmask, biases, penalties, in this order."""
    num_rows, num_tokens = logits.shape
    rows = torch.arange(num_rows, device=logits.device)
    scores = logits
    if sampling.bitmask is not None:
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        masks = sampling.bitmask[sampling.bitmask_rows.long().clamp(min=0)]
        allowed = (masks[:, :, None] >> bits & 1).flatten(1)[:, :num_tokens] != 0
        scores = scores.masked_fill(~allowed & (sampling.bitmask_rows >= 0)[:, None], float("-inf"))
    entries = torch.arange(len(sampling.bias_ids), device=logits.device)
    owners = torch.searchsorted(sampling.bias_starts[1:].contiguous(), entries.int(), right=True)
    scores = scores.index_put((owners, sampling.bias_ids.long()), sampling.biases, accumulate=True)
    tokens = sampling.history[sampling.places.long()].long()
    places = torch.arange(tokens.shape[1], device=logits.device)
    starts, ends = sampling.prompt_lens[:, None], (sampling.prompt_lens + sampling.positions)[:, None]
    in_prompt, in_output = places < starts, (places >= starts) & (places < ends)
    tokens = tokens.where(in_prompt | in_output, 0)
    counts = torch.zeros(2, num_rows, num_tokens, dtype=torch.int32, device=logits.device)
    for kind, counted in enumerate((in_prompt, in_output)):
        counts[kind].index_put_((rows[:, None].expand_as(tokens), tokens), counted.int(), accumulate=True)
    repetition, presence, frequency = (
        penalties[:, None]
        for penalties in (sampling.repetition_penalties, sampling.presence_penalties, sampling.frequency_penalties)
    )
    penalized = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(counts.sum(dim=0) > 0, penalized, scores)
    return torch.where(counts[1] > 0, scores - (frequency * counts[1] + presence), scores)


def kept(scores: Tensor, sampling: DeviceSampling) -> Tensor:
    """scores [R, V] → which tokens top_k, top_p and min_p leave, [R, V] bool. In float64, as the reference."""
    num_tokens = scores.shape[1]
    values, ids = torch.sort(scores, dim=1, descending=True, stable=True)
    # Greedy rows need no filter, and cannot be divided by their temperature.
    temperatures = torch.where(sampling.temperatures > 0, sampling.temperatures, 1.0).double()[:, None]
    weights = ((values.double() - values[:, :1]) / temperatures).exp()
    top_k = torch.where(sampling.top_ks > 0, sampling.top_ks, num_tokens)[:, None]
    ranks = torch.arange(num_tokens, device=scores.device)
    weights = weights.masked_fill(ranks >= top_k, 0.0)
    top_p, min_p = sampling.top_ps.double()[:, None], sampling.min_ps.double()[:, None]
    reached_before = weights.cumsum(dim=1) - weights
    keep = (
        (ranks < top_k)
        & ((top_p >= 1) | (reached_before < top_p * row_sums(weights)[:, None]))
        & (weights >= min_p)
        & (values > float("-inf"))
    )
    return torch.zeros_like(keep).scatter(1, ids, keep)
