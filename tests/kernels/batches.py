"""Random attention inputs for the tests: sequences whose blocks lie anywhere in a cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmd_kernels import AttentionBatch


@dataclass(frozen=True)
class Heads:
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64


SMOLLM = Heads()


@dataclass(frozen=True)
class Context:
    """Q, K and V of every position of one sequence: the truth, however it is later cut, placed and batched."""

    q: Tensor  # [length, num_heads, D]
    k: Tensor  # [length, num_kv_heads, D]
    v: Tensor


def context(length: int, heads: Heads = SMOLLM, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Context:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(length, heads.num_heads, heads.head_dim, generator=g, dtype=dtype)
    k, v = torch.randn(2, length, heads.num_kv_heads, heads.head_dim, generator=g, dtype=dtype).unbind(0)
    return Context(q, k, v)


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: AttentionBatch


def inputs(
    contexts: list[Context], num_queries: list[int], *, block_size: int = 16, block_seed: int = 0, filling: float = 0.0
) -> Inputs:
    """A step in which each sequence computes its last num_queries positions; blocks are dealt in a random order."""
    heads, head_dim = contexts[0].k.shape[1:]
    num_blocks = [-(-len(c.q) // block_size) for c in contexts]
    order = torch.randperm(sum(num_blocks) + 2, generator=torch.Generator().manual_seed(block_seed)).tolist()
    dtype = contexts[0].q.dtype
    k_cache = torch.full((len(order), heads, block_size, head_dim), filling, dtype=dtype)
    v_cache = k_cache.clone()
    # Entries behind a sequence's blocks must not be read: an id that would be out of range.
    tables = torch.full((len(contexts), max([*num_blocks, 1])), 10**6)
    for s, c in enumerate(contexts):
        for b in range(num_blocks[s]):
            tables[s, b] = block = order.pop()
            part = slice(b * block_size, (b + 1) * block_size)
            k_cache[block, :, : len(c.k[part])] = c.k[part].transpose(0, 1)
            v_cache[block, :, : len(c.v[part])] = c.v[part].transpose(0, 1)
    rows = torch.cat([c.q[len(c.q) - n :] for c, n in zip(contexts, num_queries, strict=True)])
    num_rows = max(8, -(-len(rows) // 8) * 8)
    q = torch.full((num_rows, *rows.shape[1:]), torch.nan, dtype=dtype)
    q[: len(rows)] = rows
    starts = torch.tensor([0, *num_queries]).cumsum(0)
    lens = torch.tensor([len(c.q) for c in contexts], dtype=torch.int64)
    return Inputs(q, k_cache, v_cache, AttentionBatch(starts, lens, tables, block_size))
