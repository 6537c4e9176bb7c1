"""`sample_on_device` in Triton: no sort, nothing read back, launches of a fixed size.

Every row: each chunk's best token (with noise; without where the row filters), then the best of the chunks. Rows that
filter: a bound from the chunks' maxima, the tokens above it collected, the draw among them (`triton_filters.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.sample.device import DeviceSampling
from llmd_kernels.sample.triton_adjust import adjusted, load_scores
from llmd_kernels.sample.triton_filters import GROUP, draw_filtered, is_filtered
from llmd_kernels.sample.triton_noise import best_of, gumbel, noisy, pick_kernel
from llmd_kernels.sample.triton_ranks import weights_of

# Token ids of one program.
CHUNK = 4096


def sample_on_device(logits: Tensor, sampling: DeviceSampling) -> Tensor:
    """At most six launches, two where no row asks for more than a temperature."""
    num_rows, num_tokens = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return token_ids
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    scores = adjusted(logits, sampling) if sampling.adjusts else None
    num_chunks = triton.cdiv(num_tokens, CHUNK)
    best_scores = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=logits.device)
    best_ids = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=logits.device)
    group_maxima = chunk_masses = None
    if sampling.filters:
        group_maxima = torch.empty(num_rows, num_chunks * (CHUNK // GROUP), dtype=torch.float32, device=logits.device)
        chunk_masses = torch.empty_like(best_scores)
    scan_kernel[(num_rows, num_chunks)](
        logits,
        scores,
        sampling.flags,
        sampling.temperatures,
        sampling.seeds,
        sampling.positions,
        sampling.choices,
        best_scores,
        best_ids,
        group_maxima,
        chunk_masses,
        num_tokens,
        logits.stride(0),
        TOKENS=CHUNK,
        GROUP_SIZE=GROUP,
        num_warps=8,
    )
    pick_kernel[(num_rows,)](
        best_scores,
        best_ids,
        token_ids,
        num_chunks,
        num_chunks,
        num_tokens,
        PARTS=min(1024, triton.next_power_of_2(num_chunks)),
    )
    if group_maxima is not None and chunk_masses is not None:
        draw_filtered(logits, scores, sampling, best_scores, group_maxima, chunk_masses, token_ids)
    return token_ids


@triton.jit
def scan_kernel(
    logits,
    scores,
    flags,
    temperatures,
    seeds,
    positions,
    choices,
    best_scores,
    best_ids,
    group_maxima,
    chunk_masses,
    num_tokens,
    logits_stride,
    TOKENS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Each chunk's best score and its id; for rows that filter also what a bound can be guessed from.

    Grid: (R, chunks of V).
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids = chunk * TOKENS + tl.arange(0, TOKENS)
    score = load_scores(logits, scores, flags, row, ids, num_tokens, logits_stride)
    temperature = tl.load(temperatures + row)
    # The outer condition is decided when the kernel is compiled.
    if group_maxima is not None:  # noqa: SIM102
        if is_filtered(flags, row):
            maxima = tl.max(tl.reshape(score, [TOKENS // GROUP_SIZE, GROUP_SIZE]), axis=1)
            places = chunk * (TOKENS // GROUP_SIZE) + tl.arange(0, TOKENS // GROUP_SIZE)
            num_groups = tl.num_programs(1) * (TOKENS // GROUP_SIZE)
            tl.store(group_maxima + row * num_groups + places, maxima)
            mass = tl.sum(weights_of(score, tl.max(score, axis=0), temperature), axis=0)
            tl.store(chunk_masses + row * tl.num_programs(1) + chunk, mass)
            # The noise comes later, for the tokens that are left.
            temperature = 0.0
    if temperature > 0:
        groups = chunk * (TOKENS // 4) + tl.arange(0, TOKENS // 4)
        noise = gumbel(groups, tl.load(seeds + row), tl.load(positions + row), tl.load(choices + row))
        score = noisy(score, temperature, tl.reshape(noise, [TOKENS]))
    best, best_id = best_of(score, ids, 0)
    place = row * tl.num_programs(1) + chunk + tl.arange(0, 1)
    tl.store(best_scores + place, best)
    tl.store(best_ids + place, best_id)
