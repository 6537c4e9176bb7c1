"""Bitmask, biases and penalties in Triton. A program owns a tile of a row's scores: no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.sample.device import DeviceSampling
from llmd_kernels.sample.records import ADJUSTS, PENALIZES

TILE = 2048
# Tokens of a history that are counted at a time.
HISTORY = 1024

HAS_SCORES = tl.constexpr(ADJUSTS)
HAS_PENALTIES = tl.constexpr(PENALIZES)


def adjusted(logits: Tensor, sampling: DeviceSampling) -> Tensor:
    """logits [R, V] → scores [R, V] float32; rows that ask for nothing are not written."""
    num_rows, num_tokens = logits.shape
    scores = torch.empty(num_rows, num_tokens, dtype=torch.float32, device=logits.device)
    bitmask = sampling.bitmask
    adjust_kernel[(num_rows, triton.cdiv(num_tokens, TILE))](
        logits,
        scores,
        sampling.flags,
        sampling.bias_starts,
        sampling.bias_ids,
        sampling.biases,
        sampling.bitmask_rows,
        bitmask,
        sampling.repetition_penalties,
        sampling.presence_penalties,
        sampling.frequency_penalties,
        sampling.history,
        sampling.places,
        sampling.prompt_lens,
        sampling.positions,
        num_tokens,
        logits.stride(0),
        0 if bitmask is None else bitmask.stride(0),
        sampling.history.stride(0),
        sampling.history.shape[1],
        TOKENS=TILE,
        CHUNK=HISTORY,
        num_warps=8,
    )
    return scores


@triton.jit
def adjust_kernel(
    logits,
    scores,
    flags,
    bias_starts,
    bias_ids,
    biases,
    bitmask_rows,
    bitmask,
    repetitions,
    presences,
    frequencies,
    history,
    places,
    prompt_lens,
    positions,
    num_tokens,
    logits_stride,
    bitmask_stride,
    history_stride,
    history_len,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: (R, tiles of V)."""
    row = tl.program_id(0).to(tl.int64)
    first_id = tl.program_id(1) * TOKENS
    asked = tl.load(flags + row)
    if asked & HAS_SCORES:
        ids = first_id + tl.arange(0, TOKENS)
        mask = ids < num_tokens
        score = tl.load(logits + row * logits_stride + ids, mask=mask, other=0.0).to(tl.float32)
        if bitmask is not None:
            bitmask_row = tl.load(bitmask_rows + row).to(tl.int64)
            if bitmask_row >= 0:
                words = tl.load(bitmask + bitmask_row * bitmask_stride + ids // 32, mask=mask, other=0)
                score = tl.where((words >> (ids % 32)) & 1 != 0, score, float("-inf"))
        for entry in range(tl.load(bias_starts + row), tl.load(bias_starts + row + 1)):
            score += tl.where(ids == tl.load(bias_ids + entry), tl.load(biases + entry), 0.0)
        if asked & HAS_PENALTIES:
            tokens = history + tl.load(places + row).to(tl.int64) * history_stride
            num_prompt = tl.load(prompt_lens + row)
            num_all = num_prompt + tl.load(positions + row)
            in_prompt = counts(tokens, 0, num_prompt, history_len, first_id, TOKENS, CHUNK)
            in_output = counts(tokens, num_prompt, num_all, history_len, first_id, TOKENS, CHUNK)
            repetition = tl.load(repetitions + row)
            repeated = tl.where(score > 0, score / repetition, score * repetition)
            score = tl.where(in_prompt + in_output > 0, repeated, score)
            penalty = tl.load(frequencies + row) * in_output.to(tl.float32) + tl.load(presences + row)
            score = tl.where(in_output > 0, score - penalty, score)
        tl.store(scores + row * num_tokens + ids, score, mask=mask)


@triton.jit
def load_scores(logits, scores, flags, row, ids, num_tokens, logits_stride):
    """The row's scores of these ids, where it has any, else its logits: float32; -inf beyond the last id."""
    mask = ids < num_tokens
    if scores is None:
        found = tl.load(logits + row * logits_stride + ids, mask=mask, other=float("-inf")).to(tl.float32)
    elif tl.load(flags + row) & HAS_SCORES:
        found = tl.load(scores + row * num_tokens + ids, mask=mask, other=float("-inf"))
    else:
        found = tl.load(logits + row * logits_stride + ids, mask=mask, other=float("-inf")).to(tl.float32)
    return found


@triton.jit
def counts(tokens, start, end, history_len, first_id, TOKENS: tl.constexpr, CHUNK: tl.constexpr):
    """How often each of TOKENS ids from first_id on occurs among tokens[start:end]: int32 [TOKENS].

    Whole wide loads are read, with neighbours on either side that do not count.
    """
    total = tl.zeros([TOKENS], tl.int32)
    stop = tl.minimum(tl.cdiv(end, 4) * 4, history_len)
    for first in range(start // 4 * 4, stop, CHUNK):
        index = first + tl.arange(0, CHUNK)
        token = tl.load(tokens + index, mask=index < stop, other=-1)
        place = tl.where((index >= start) & (index < end), token, -1) - first_id
        total += tl.histogram(place, TOKENS, mask=(place >= 0) & (place < TOKENS))
    return total
