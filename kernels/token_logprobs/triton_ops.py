"""`token_logprobs_on_device` in Triton: each chunk's maximum, mass and number of better tokens, then their sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.token_logprobs.result import DeviceLogprobs
from llmd_kernels.top_tokens.triton_ops import top_tokens

# Logits of a row that one program sums. Changing this changes the last bits.
CHUNK = 4096


def token_logprobs_on_device(logits: Tensor, token_ids: Tensor, num_top: int) -> DeviceLogprobs:
    """Two launches, and two more where the most likely tokens are asked for."""
    num_rows, num_tokens = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    device = logits.device
    logprobs, largest, log_masses = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(3))
    ranks = torch.empty(num_rows, dtype=torch.int32, device=device)
    top_values, top_ids = top_tokens(logits, num_top)
    if num_rows:
        num_chunks = triton.cdiv(num_tokens, CHUNK)
        maxima, masses = (torch.empty(num_rows, num_chunks, dtype=torch.float32, device=device) for _ in range(2))
        num_better = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=device)
        chunk_kernel[(num_rows, num_chunks)](
            logits, token_ids, maxima, masses, num_better, num_tokens, logits.stride(0), TOKENS=CHUNK, num_warps=8
        )
        row_kernel[(num_rows,)](
            logits,
            token_ids,
            maxima,
            masses,
            num_better,
            logprobs,
            largest,
            log_masses,
            ranks,
            num_chunks,
            logits.stride(0),
            CHUNKS=triton.next_power_of_2(num_chunks),
            num_warps=1,
        )
    # As in `row_kernel`: the token is often one of these.
    top_logprobs = top_values.float() - largest[:, None] - log_masses[:, None]
    return DeviceLogprobs(token_ids, logprobs, ranks, top_ids, top_logprobs)


@triton.jit
def chunk_kernel(logits, token_ids, maxima, masses, num_better, num_tokens, logits_stride, TOKENS: tl.constexpr):
    """Grid: (R, chunks of V)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids = chunk * TOKENS + tl.arange(0, TOKENS)
    score = tl.load(logits + row * logits_stride + ids, mask=ids < num_tokens, other=float("-inf")).to(tl.float32)
    token_id = tl.load(token_ids + row)
    chosen = tl.load(logits + row * logits_stride + token_id).to(tl.float32)
    # What lies behind the end is -inf and has higher ids: it is not better.
    better = (score > chosen) | ((score == chosen) & (ids < token_id))
    place = row * tl.num_programs(1) + chunk
    tl.store(num_better + place, tl.sum(better.to(tl.int32), axis=0))
    largest = tl.max(score, axis=0)
    mass = tl.sum(tl.where(score > float("-inf"), tl.exp(score - largest), 0.0), axis=0)
    tl.store(maxima + place, largest)
    tl.store(masses + place, mass)


@triton.jit
def row_kernel(
    logits,
    token_ids,
    maxima,
    masses,
    num_better,
    logprobs,
    largest_logits,
    log_masses,
    ranks,
    num_chunks,
    logits_stride,
    CHUNKS: tl.constexpr,
):
    """Grid: (R,)."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    mask = chunks < num_chunks
    of_chunks = tl.load(maxima + row * num_chunks + chunks, mask=mask, other=float("-inf"))
    largest = tl.max(of_chunks, axis=0)
    mass = tl.load(masses + row * num_chunks + chunks, mask=mask, other=0.0)
    log_mass = tl.log(tl.sum(mass * tl.exp(of_chunks - largest), axis=0))
    chosen = tl.load(logits + row * logits_stride + tl.load(token_ids + row)).to(tl.float32)
    better = tl.sum(tl.load(num_better + row * num_chunks + chunks, mask=mask, other=0), axis=0)
    # Not less the sum of both, in which a large logit would leave no place for a small logarithm.
    tl.store(logprobs + row, chosen - largest - log_mass)
    tl.store(largest_logits + row, largest)
    tl.store(log_masses + row, log_mass)
    tl.store(ranks + row, better + 1)
