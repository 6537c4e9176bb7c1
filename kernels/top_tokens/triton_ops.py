"""`top_tokens` in Triton: the largest entries of each chunk, one after another, then the largest of those."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.sample.triton_noise import best_of
from llmd_kernels.top_tokens import reference

# Entries of a row that one program looks at.
CHUNK = 4096
# Each entry costs a look at the whole chunk: from here on a sort costs less.
MAX_K = 32


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Two launches; sorted in full where more than MAX_K are asked for."""
    num_rows, num_tokens = logits.shape
    if k > MAX_K:
        return reference.top_tokens(logits, k)
    values = torch.empty(num_rows, k, dtype=logits.dtype, device=logits.device)
    ids = torch.empty(num_rows, k, dtype=torch.int64, device=logits.device)
    if num_rows == 0 or k == 0:
        return values, ids
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_chunks = triton.cdiv(num_tokens, CHUNK)
    chunk_values = torch.empty(num_rows, num_chunks, k, dtype=torch.float32, device=logits.device)
    chunk_ids = torch.empty(num_rows, num_chunks, k, dtype=torch.int32, device=logits.device)
    top_of_chunk_kernel[(num_rows, num_chunks)](
        logits, chunk_values, chunk_ids, num_tokens, logits.stride(0), k, TOKENS=CHUNK, num_warps=8
    )
    num_entries = num_chunks * k
    top_of_chunks_kernel[(num_rows,)](
        chunk_values, chunk_ids, values, ids, num_entries, k, ENTRIES=triton.next_power_of_2(num_entries), num_warps=4
    )
    return values, ids


@triton.jit(do_not_specialize=["k"])
def top_of_chunk_kernel(logits, chunk_values, chunk_ids, num_tokens, logits_stride, k, TOKENS: tl.constexpr):
    """Grid: (R, chunks of V). chunk_values, chunk_ids [R, chunks, k]; a chunk with fewer entries fills up with -inf."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    values = tl.load(logits + row * logits_stride + ids, mask=ids < num_tokens, other=float("-inf")).to(tl.float32)
    ids = tl.where(ids < num_tokens, ids, 2147483647)
    place = (row * tl.num_programs(1) + tl.program_id(1)) * k + tl.arange(0, 1)
    for rank in range(k):
        value, token_id = best_of(values, ids, 0)
        tl.store(chunk_values + place + rank, value)
        tl.store(chunk_ids + place + rank, token_id)
        values, ids = without(values, ids, token_id)


@triton.jit(do_not_specialize=["k", "num_entries"])
def top_of_chunks_kernel(chunk_values, chunk_ids, top_values, top_ids, num_entries, k, ENTRIES: tl.constexpr):
    """Grid: (R,)."""
    row = tl.program_id(0).to(tl.int64)
    entries = tl.arange(0, ENTRIES)
    mask = entries < num_entries
    values = tl.load(chunk_values + row * num_entries + entries, mask=mask, other=float("-inf"))
    ids = tl.load(chunk_ids + row * num_entries + entries, mask=mask, other=2147483647)
    place = row * k + tl.arange(0, 1)
    for rank in range(k):
        value, token_id = best_of(values, ids, 0)
        tl.store(top_values + place + rank, value.to(top_values.dtype.element_ty))
        tl.store(top_ids + place + rank, token_id.to(tl.int64))
        values, ids = without(values, ids, token_id)


@triton.jit
def without(values, ids, token_id):
    """What is taken counts as one that does not exist."""
    taken = ids == token_id
    return tl.where(taken, float("-inf"), values), tl.where(taken, 2147483647, ids)
