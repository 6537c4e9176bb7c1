"""The truth of `sample`: contract C2 written out, row by row, in Python's floats and integers."""

import math
from collections import Counter

import torch
from torch import Tensor

from llmd_kernels.sample.batch import RowSampling, SampledTokens, SamplingBatch
from llmd_kernels.sample.device import DeviceSampling
from llmd_kernels.token_logprobs import reference as token_logprobs_reference


def sample(logits: Tensor, batch: SamplingBatch, *, mask: Tensor | None = None) -> SampledTokens:
    """Draw one token a row."""
    token_ids, logprobs = [], []
    for r, sampling in enumerate(batch.sampling):
        prompt = batch.token_ids[r][: batch.num_prompt_tokens[r]]
        output = batch.token_ids[r][batch.num_prompt_tokens[r] :]
        scores = processed_logits(logits[r].tolist(), sampling, list(prompt), list(output))
        if mask is not None:
            scores = [s if allowed else -math.inf for s, allowed in zip(scores, mask[r].tolist(), strict=True)]
        token_ids.append(draw(scores, sampling, position=len(output)))
        logprobs.append(
            None
            if sampling.num_logprobs is None
            else token_logprobs_reference.token_logprobs(
                logits[r : r + 1], torch.tensor(token_ids[-1:]), sampling.num_logprobs
            )[0]
        )
    return SampledTokens(torch.tensor(token_ids, dtype=torch.int64, device=logits.device), logprobs)


def sample_on_device(logits: Tensor, sampling: DeviceSampling) -> Tensor:
    """The same rows, read back from the device's tensors."""
    token_ids = []
    for r, row_logits in enumerate(logits.tolist()):
        biases = slice(int(sampling.bias_starts[r]), int(sampling.bias_starts[r + 1]))
        row = RowSampling(
            seed=int(sampling.seeds[r]) % 2**64,
            choice=int(sampling.choices[r]) % 2**32,
            temperature=float(sampling.temperatures[r]),
            top_k=int(sampling.top_ks[r]),
            top_p=float(sampling.top_ps[r]),
            min_p=float(sampling.min_ps[r]),
            repetition_penalty=float(sampling.repetition_penalties[r]),
            presence_penalty=float(sampling.presence_penalties[r]),
            frequency_penalty=float(sampling.frequency_penalties[r]),
            logit_bias=dict(zip(sampling.bias_ids[biases].tolist(), sampling.biases[biases].tolist(), strict=True)),
        )
        num_prompt, position = int(sampling.prompt_lens[r]), int(sampling.positions[r])
        tokens = sampling.history[int(sampling.places[r]), : num_prompt + position].tolist()
        scores = processed_logits(row_logits, row, tokens[:num_prompt], tokens[num_prompt:])
        bitmask_row = int(sampling.bitmask_rows[r])
        if sampling.bitmask is not None and bitmask_row >= 0:
            words = sampling.bitmask[bitmask_row].tolist()
            scores = [s if words[i // 32] >> i % 32 & 1 else -math.inf for i, s in enumerate(scores)]
        token_ids.append(draw(scores, row, position=position))
    return torch.tensor(token_ids, dtype=torch.int64, device=logits.device)


def processed_logits(logits: list[float], sampling: RowSampling, prompt: list[int], output: list[int]) -> list[float]:
    """After min_tokens, logit_bias and the penalties. The grammar mask commutes with all of them."""
    scores = list(logits)
    if len(output) < sampling.min_tokens:
        for token_id in sampling.stop_token_ids:
            scores[token_id] = -math.inf
    for token_id, bias in sampling.logit_bias.items():
        scores[token_id] += bias
    for token_id in set(prompt) | set(output):
        penalty = sampling.repetition_penalty
        scores[token_id] = scores[token_id] / penalty if scores[token_id] > 0 else scores[token_id] * penalty
    for token_id, count in Counter(output).items():
        scores[token_id] -= sampling.frequency_penalty * count + sampling.presence_penalty
    return scores


def survivors(scores: list[float], sampling: RowSampling) -> dict[int, float]:
    """Token id → (logit - largest logit) / temperature of the tokens that top_k, top_p and min_p leave."""
    largest = max(scores)
    scaled = {i: (score - largest) / sampling.temperature for i, score in enumerate(scores) if score > -math.inf}
    ranked = sorted(scaled, key=lambda i: (-scaled[i], i))
    if sampling.top_k > 0:
        ranked = ranked[: sampling.top_k]
    weights = {i: math.exp(scaled[i]) for i in ranked}
    if sampling.top_p < 1:
        wanted, reached, kept = sampling.top_p * math.fsum(weights.values()), 0.0, []
        for i in ranked:
            kept.append(i)
            reached += weights[i]
            if reached >= wanted:
                break
        ranked = kept
    return {i: scaled[i] for i in ranked if weights[i] >= sampling.min_p}


def draw(scores: list[float], sampling: RowSampling, *, position: int) -> int:
    """The survivor with the largest logit plus Gumbel noise; without noise at temperature 0."""
    if sampling.temperature == 0:
        return max(range(len(scores)), key=lambda i: (scores[i], -i))
    noisy = {
        i: score + gumbel(sampling.seed, position, sampling.choice, i)
        for i, score in survivors(scores, sampling).items()
    }
    return max(noisy, key=lambda i: (noisy[i], -i))


def gumbel(seed: int, position: int, choice: int, token_id: int) -> float:
    """The noise of one token: -log(-log(u)), u = 1 - (word + ½) / 2**32 of its word of Philox."""
    word = philox((token_id // 4, position, choice, 0), (seed & 0xFFFFFFFF, seed >> 32))[token_id % 4]
    return -math.log(-math.log1p(-(word + 0.5) / 2**32))


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3
