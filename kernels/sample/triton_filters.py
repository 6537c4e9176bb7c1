"""top_k, top_p and min_p in Triton, and the draw among what they leave. Exact, without a sort of the row.

A bound is guessed from the maxima of groups of tokens; tokens from the bound on are collected, in any order, and if
they are few and hold all survivors (which is checked, so a poor guess costs time, not truth), each is ranked among
them. Otherwise the whole row is bisected. Both compare the same 64-bit ranks, all different, and sum the same integer
weights, so no order of additions can show.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.sample.device import DeviceSampling
from llmd_kernels.sample.records import FILTERS
from llmd_kernels.sample.triton_adjust import load_scores
from llmd_kernels.sample.triton_noise import best_of, gumbel_of_ids, noisy
from llmd_kernels.sample.triton_ranks import ranks_of, units_of, wanted_units, weights_of
from llmd_kernels.target import target_kind

# Token ids that share one maximum.
GROUP = 128
# Tokens that are ranked among each other.
MAX_CANDIDATES = 1024
COLLECT = 2048
# Token ids below this fit into a rank.
MAX_VOCAB_SIZE = 1 << 20

HAS_FILTERS = tl.constexpr(FILTERS)


def draw_filtered(
    logits: Tensor,
    scores: Tensor | None,
    sampling: DeviceSampling,
    chunk_maxima: Tensor,
    group_maxima: Tensor,
    chunk_masses: Tensor,
    token_ids: Tensor,
) -> None:
    """Overwrite the tokens of the rows that filter."""
    num_rows, num_tokens = logits.shape
    if num_tokens > MAX_VOCAB_SIZE:
        raise ValueError(f"a vocabulary of {num_tokens}: filters know at most {MAX_VOCAB_SIZE} token ids")
    device = logits.device
    largest, bounds = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(2))
    num_candidates = torch.empty(num_rows, dtype=torch.int32, device=device)
    candidate_scores = torch.empty(num_rows, MAX_CANDIDATES, dtype=torch.float32, device=device)
    candidate_ids = torch.empty(num_rows, MAX_CANDIDATES, dtype=torch.int32, device=device)
    filters = (sampling.flags, sampling.temperatures, sampling.top_ks, sampling.top_ps, sampling.min_ps)
    num_chunks = triton.cdiv(num_tokens, COLLECT)
    masses = torch.empty(num_rows, num_chunks, dtype=torch.int64, device=device)
    bound_kernel[(num_rows,)](
        *filters,
        chunk_maxima,
        group_maxima,
        chunk_masses,
        largest,
        bounds,
        num_candidates,
        NUM_CHUNKS=chunk_maxima.shape[1],
        NUM_GROUPS=group_maxima.shape[1],
        CHUNKS=triton.next_power_of_2(chunk_maxima.shape[1]),
        GROUPS=triton.next_power_of_2(group_maxima.shape[1]),
        num_warps=4,
    )
    collect_kernel[(num_rows, num_chunks)](
        logits,
        scores,
        sampling.flags,
        sampling.temperatures,
        largest,
        bounds,
        num_candidates,
        candidate_scores,
        candidate_ids,
        masses,
        num_tokens,
        logits.stride(0),
        TOKENS=COLLECT,
        CANDIDATES=MAX_CANDIDATES,
        num_warps=8,
    )
    choose_kernel[(num_rows,)](
        logits,
        scores,
        *filters,
        sampling.seeds,
        sampling.positions,
        sampling.choices,
        largest,
        bounds,
        num_candidates,
        candidate_scores,
        candidate_ids,
        masses,
        token_ids,
        num_tokens,
        num_chunks,
        logits.stride(0),
        CANDIDATES=MAX_CANDIDATES,
        CHUNKS=triton.next_power_of_2(num_chunks),
        TOKENS=2048,
        TOGETHER=_together(),
        num_warps=8,
    )


def _together() -> int:
    """Candidates that a candidate is compared with at a time. On sm_120 eight of them spill."""
    return 4 if target_kind() == "sm_120" else 8


@triton.jit
def is_filtered(flags, row):
    return (tl.load(flags + row) & HAS_FILTERS) != 0


@triton.jit
def reaches(maxima, weights, bound, top_k, wanted):
    """Whether maxima from the bound on are top_k, or without top_k weigh as much as wanted."""
    reach = maxima >= bound
    if top_k > 0:
        enough = tl.sum(reach.to(tl.int32), axis=0) >= top_k
    else:
        enough = tl.sum(tl.where(reach, weights, 0.0), axis=0) >= wanted
    return enough


@triton.jit
def bound_kernel(
    flags,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    chunk_maxima,
    group_maxima,
    chunk_masses,
    largest,
    bounds,
    num_candidates,
    NUM_CHUNKS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A score that all survivors reach, as a guess: enough maxima of groups reach it. -inf: no guess. Grid: (R,)."""
    row = tl.program_id(0).to(tl.int64)
    if is_filtered(flags, row):
        temperature, top_k, top_p = tl.load(temperatures + row), tl.load(top_ks + row), tl.load(top_ps + row)
        chunks, groups = tl.arange(0, CHUNKS), tl.arange(0, GROUPS)
        of_chunks = tl.load(chunk_maxima + row * NUM_CHUNKS + chunks, mask=chunks < NUM_CHUNKS, other=float("-inf"))
        of_groups = tl.load(group_maxima + row * NUM_GROUPS + groups, mask=groups < NUM_GROUPS, other=float("-inf"))
        top = tl.max(of_chunks, axis=0)
        masses = tl.load(chunk_masses + row * NUM_CHUNKS + chunks, mask=chunks < NUM_CHUNKS, other=0.0)
        total = tl.sum(masses * weights_of(of_chunks, top, temperature), axis=0)
        weights = weights_of(of_groups, top, temperature)
        # Float sums: a little more than wanted, as a bound that is too low costs less than one that is too high.
        wanted = top_p * total * 1.0001
        low, high = tl.min(tl.where(of_groups > float("-inf"), of_groups, top), axis=0), top
        if reaches(of_groups, weights, low, top_k, wanted):
            for _ in range(16):
                middle = low + (high - low) * 0.5
                enough = reaches(of_groups, weights, middle, top_k, wanted)
                low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        else:
            low = float("-inf")
        if (top_k == 0) & (top_p >= 1.0):
            # A little below what min_p keeps: the weights decide.
            low = top + temperature * (tl.log(tl.load(min_ps + row)) - 0.001)
        tl.store(largest + row, top)
        tl.store(bounds + row, low)
        tl.store(num_candidates + row, 0)


@triton.jit
def collect_kernel(
    logits,
    scores,
    flags,
    temperatures,
    largest,
    bounds,
    num_candidates,
    candidate_scores,
    candidate_ids,
    masses,
    num_tokens,
    logits_stride,
    TOKENS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Tokens from the bound on, in any order, as far as they fit; the weight of each chunk. Grid: (R, chunks of V)."""
    row = tl.program_id(0).to(tl.int64)
    if is_filtered(flags, row):
        ids = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        score = load_scores(logits, scores, flags, row, ids, num_tokens, logits_stride)
        units = units_of(weights_of(score, tl.load(largest + row), tl.load(temperatures + row)))
        tl.store(masses + row * tl.num_programs(1) + tl.program_id(1), tl.sum(units, axis=0))
        found = (score >= tl.load(bounds + row)) & (score > float("-inf"))
        num_found = tl.sum(found.to(tl.int32), axis=0)
        if num_found > 0:
            first = tl.atomic_add(num_candidates + row, num_found, sem="relaxed")
            place = first + tl.cumsum(found.to(tl.int32), axis=0) - 1
            fits = found & (place < CANDIDATES)
            tl.store(candidate_scores + row * CANDIDATES + place, score, mask=fits)
            tl.store(candidate_ids + row * CANDIDATES + place, ids, mask=fits)


@triton.jit
def choose_kernel(
    logits,
    scores,
    flags,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    choices,
    largest,
    bounds,
    num_candidates,
    candidate_scores,
    candidate_ids,
    masses,
    token_ids,
    num_tokens,
    num_chunks,
    logits_stride,
    CANDIDATES: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Filter and draw. Grid: (R,)."""
    row = tl.program_id(0).to(tl.int64)
    if is_filtered(flags, row):
        temperature, top = tl.load(temperatures + row), tl.load(largest + row)
        top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
        seed, position, choice = tl.load(seeds + row), tl.load(positions + row), tl.load(choices + row)
        chunks = tl.arange(0, CHUNKS)
        total = tl.sum(tl.load(masses + row * num_chunks + chunks, mask=chunks < num_chunks, other=0), axis=0)
        num = tl.load(num_candidates + row)
        place = tl.arange(0, CANDIDATES)
        valid = place < num
        candidate_scores += row * CANDIDATES
        candidate_ids += row * CANDIDATES
        score = tl.load(candidate_scores + place, mask=valid, other=float("-inf"))
        ids = tl.load(candidate_ids + place, mask=valid, other=1048575)
        complete = num <= CANDIDATES
        # With a bound of -inf all were collected; otherwise the guess must have been low enough.
        if tl.load(bounds + row) > float("-inf"):
            if top_k > 0:
                complete = complete & (num >= top_k)
            elif top_p < 1.0:
                held = tl.sum(units_of(weights_of(score, top, temperature)), axis=0)
                complete = complete & (held >= wanted_units(total, top_p))
        if complete:
            kept = kept_among(
                candidate_scores, candidate_ids, num, score, ids, top, temperature, top_k, top_p, min_p, total, TOGETHER
            )
            drawn = noisy(score, temperature, gumbel_of_ids(ids, seed, position, choice))
            _, token_id = best_of(tl.where(valid & kept, drawn, float("-inf")), ids, 0)
        else:
            # Ranks of all tokens lie between these two.
            low, high = ranks_of(float("-inf"), 1048575), ranks_of(top, 0) + 1
            if top_k > 0:
                low, total = cut(
                    logits,
                    scores,
                    flags,
                    row,
                    num_tokens,
                    logits_stride,
                    top,
                    temperature,
                    low,
                    high,
                    total,
                    top_k,
                    0,
                    TOKENS,
                )
            if top_p < 1.0:
                wanted = wanted_units(total, top_p)
                low, total = cut(
                    logits,
                    scores,
                    flags,
                    row,
                    num_tokens,
                    logits_stride,
                    top,
                    temperature,
                    low,
                    high,
                    total,
                    0,
                    wanted,
                    TOKENS,
                )
            best = tl.full([TOKENS], float("-inf"), tl.float32)
            best_ids = tl.full([TOKENS], 2147483647, tl.int32)
            for first in range(0, num_tokens, TOKENS):
                ids_here = first + tl.arange(0, TOKENS)
                score_here = load_scores(logits, scores, flags, row, ids_here, num_tokens, logits_stride)
                kept_here = ranks_of(score_here, ids_here) >= low
                kept_here = kept_here & (weights_of(score_here, top, temperature) >= min_p)
                drawn_here = noisy(score_here, temperature, gumbel_of_ids(ids_here, seed, position, choice))
                better = kept_here & (drawn_here > best)
                best, best_ids = tl.where(better, drawn_here, best), tl.where(better, ids_here, best_ids)
            _, token_id = best_of(best, best_ids, 0)
        tl.store(token_ids + row + tl.arange(0, 1), tl.minimum(token_id, num_tokens - 1).to(tl.int64))


@triton.jit
def kept_among(
    candidate_scores,
    candidate_ids,
    num,
    score,
    ids,
    top,
    temperature,
    top_k,
    top_p,
    min_p,
    total,
    TOGETHER: tl.constexpr,
):
    """Which of the candidates top_k, top_p and min_p leave: each asks all others how many are ahead of it."""
    rank = ranks_of(score, ids)
    num_ahead, units_ahead = tl.zeros_like(ids), tl.zeros_like(rank)
    for first in range(0, num, TOGETHER):
        others = first + tl.arange(0, TOGETHER)[None, :]
        other_scores = tl.load(candidate_scores + others, mask=others < num, other=float("-inf"))
        other_ids = tl.load(candidate_ids + others, mask=others < num, other=1048575)
        ahead = ranks_of(other_scores, other_ids) > rank[:, None]
        num_ahead += tl.sum(ahead.to(tl.int32), axis=1)
        other_units = units_of(weights_of(other_scores, top, temperature))
        units_ahead += tl.sum(tl.where(ahead, other_units, 0), axis=1)
    weights = weights_of(score, top, temperature)
    kept = weights >= min_p
    if top_k > 0:
        kept = kept & (num_ahead < top_k)
        total = tl.sum(tl.where(num_ahead < top_k, units_of(weights), 0), axis=0)
    if top_p < 1.0:
        kept = kept & (units_ahead < wanted_units(total, top_p))
    return kept


@triton.jit
def cut(
    logits,
    scores,
    flags,
    row,
    num_tokens,
    logits_stride,
    top,
    temperature,
    low,
    high,
    total,
    wanted_tokens,
    wanted,
    TOKENS: tl.constexpr,
):
    """The largest rank from which on there are so many tokens and so many units, and how many units those are.

    low, total: the answer where there are not so many. high: a rank above all.
    """
    while high - low > 1:
        middle = (low + high) >> 1
        number, units = tl.zeros([TOKENS], tl.int32), tl.zeros([TOKENS], tl.int64)
        for first in range(0, num_tokens, TOKENS):
            ids = first + tl.arange(0, TOKENS)
            score = load_scores(logits, scores, flags, row, ids, num_tokens, logits_stride)
            reach = (ranks_of(score, ids) >= middle) & (score > float("-inf"))
            number += reach.to(tl.int32)
            units += tl.where(reach, units_of(weights_of(score, top, temperature)), 0)
        enough = (tl.sum(number, axis=0) >= wanted_tokens) & (tl.sum(units, axis=0) >= wanted)
        total = tl.where(enough, tl.sum(units, axis=0), total)
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return low, total
