"""`sample` with PyTorch operators. Rows that ask for less cost less: greedy ones an argmax, filtered ones no sort."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmd_kernels.sample.adjust import adjusted
from llmd_kernels.sample.batch import RowSampling, SampledTokens, SamplingBatch
from llmd_kernels.sample.filters import Candidates, survivors
from llmd_kernels.sample.noise import gumbel, gumbel_of_all
from llmd_kernels.token_logprobs import TokenLogprobs, token_logprobs

# Rows drawn at a time: bounds the memory of the noise.
SLAB_ROWS = 8
# Tokens looked at first where top_k says nothing; and how many times more each time they are too few.
NUM_CANDIDATES = 256
MORE_CANDIDATES = 16


@dataclass(frozen=True, slots=True)
class NoiseKeys:
    """What the noise of each row depends on beside the token: [R] int64 each."""

    seeds: Tensor  # the signed view of 64 bits
    positions: Tensor
    choices: Tensor

    def __getitem__(self, rows: Tensor) -> "NoiseKeys":
        return NoiseKeys(self.seeds[rows], self.positions[rows], self.choices[rows])


def sample(logits: Tensor, batch: SamplingBatch, *, mask: Tensor | None = None) -> SampledTokens:
    """Sort the rows by what they need, draw each kind, then look up the logprobs that were asked for."""
    scores = adjusted(logits, batch, mask)
    token_ids = torch.empty(len(batch), dtype=torch.int64, device=logits.device)
    greedy, whole, filtered = _kinds(batch)
    if greedy:
        token_ids[greedy] = _take(scores, greedy).argmax(dim=1)
    for rows, draw in ((whole, _draw_from_all), (filtered, _draw_from_survivors)):
        for start in range(0, len(rows), SLAB_ROWS):
            slab = rows[start : start + SLAB_ROWS]
            token_ids[slab] = _drawn(_take(scores, slab), batch, slab, draw)
    return SampledTokens(token_ids, logprobs_of(logits, token_ids, batch))


def _kinds(batch: SamplingBatch) -> tuple[list[int], list[int], list[int]]:
    """Rows without chance, rows that draw from all tokens, rows that filter first."""
    kinds: tuple[list[int], list[int], list[int]] = ([], [], [])
    for r, sampling in enumerate(batch.sampling):
        if sampling.temperature == 0:
            kinds[0].append(r)
        elif sampling.top_k == 0 and sampling.top_p >= 1 and sampling.min_p == 0:
            kinds[1].append(r)
        else:
            kinds[2].append(r)
    return kinds


def _take(scores: Tensor, rows: list[int]) -> Tensor:
    return scores if len(rows) == len(scores) else scores[rows]


Draw = Callable[[Tensor, list[RowSampling], NoiseKeys], Tensor]


def _drawn(scores: Tensor, batch: SamplingBatch, rows: list[int], draw: Draw) -> Tensor:
    """scores [len(rows), V] → the token of each of these rows, [len(rows)] int64."""
    samplings = [batch.sampling[r] for r in rows]
    keys = NoiseKeys(
        seeds=torch.tensor([s.seed - (s.seed >> 63 << 64) for s in samplings], device=scores.device),
        positions=torch.tensor([batch.position(r) for r in rows], device=scores.device),
        choices=torch.tensor([s.choice for s in samplings], device=scores.device),
    )
    return draw(scores, samplings, keys)


def _draw_from_all(scores: Tensor, samplings: list[RowSampling], keys: NoiseKeys) -> Tensor:
    """The largest (logit - largest logit) / temperature + noise; argmax gives the lowest id of equal ones."""
    temperatures = torch.tensor([s.temperature for s in samplings], device=scores.device)[:, None]
    scaled = (scores - scores.amax(dim=1, keepdim=True)).div_(temperatures)
    return scaled.add_(gumbel_of_all(keys.seeds, keys.positions, keys.choices, scores.shape[1])).argmax(dim=1)


def _draw_from_survivors(scores: Tensor, samplings: list[RowSampling], keys: NoiseKeys) -> Tensor:
    """Look among the most likely tokens; rows whose survivors reach further look among more."""
    token_ids = torch.empty(len(samplings), dtype=torch.int64, device=scores.device)
    pending = torch.arange(len(samplings), device=scores.device)
    num_candidates = max(s.top_k or NUM_CANDIDATES for s in samplings)
    while len(pending):
        candidates = survivors(scores[pending], [samplings[r] for r in pending.tolist()], num_candidates)
        done = pending[candidates.complete]
        token_ids[done] = _draw_from_kept(candidates[candidates.complete], keys[done])
        pending = pending[~candidates.complete]
        num_candidates *= MORE_CANDIDATES
    return token_ids


def _draw_from_kept(candidates: Candidates, keys: NoiseKeys) -> Tensor:
    """The kept token with the largest noisy score; of equal ones the lowest id."""
    noisy = candidates.scaled + gumbel(keys.seeds, keys.positions, keys.choices, candidates.ids)
    noisy.masked_fill_(~candidates.kept, float("-inf"))
    best = noisy.amax(dim=1, keepdim=True)
    return candidates.ids.masked_fill(noisy < best, torch.iinfo(torch.int64).max).amin(dim=1)


def logprobs_of(logits: Tensor, token_ids: Tensor, batch: SamplingBatch) -> list[TokenLogprobs | None]:
    """Of the raw logits, for the rows that ask; one look for all, cut to what each asked for."""
    asked = {r: s.num_logprobs for r, s in enumerate(batch.sampling) if s.num_logprobs is not None}
    results: list[TokenLogprobs | None] = [None] * len(batch)
    if asked:
        rows = list(asked)
        found = token_logprobs(_take(logits, rows), token_ids[rows], max(asked.values()))
        for (r, num_top), entry in zip(asked.items(), found, strict=True):
            results[r] = entry._replace(top_ids=entry.top_ids[:num_top], top_logprobs=entry.top_logprobs[:num_top])
    return results
