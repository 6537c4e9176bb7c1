"""Random inputs on a machine: tensors, and sequences with keys and values in a paged cache. Knows no timing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu.machine import Machine
from llmd_kernels import AttentionBatch, paged_attention


def random_on(machine: Machine, *, seed: int) -> Callable[..., Tensor]:
    """random(*shape) → normal numbers in bfloat16."""
    generator = torch.Generator(machine.device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=machine.device, dtype=torch.bfloat16)

    return random


@dataclass(frozen=True, slots=True)
class Contexts:
    """Sequences whose blocks lie anywhere, and queries for the first of them."""

    q: Tensor  # [length of the first, num_heads, D]
    k_cache: Tensor
    v_cache: Tensor
    lens: list[int]
    block_tables: Tensor
    block_size: int
    scale: float

    def step(self, num_queries: list[int], *, q: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, AttentionBatch]:
        """Arguments of `paged_attention` for a step that computes the last so many positions of each sequence.

        q: the rows of all of them, filled up with the first ones of `self.q`.
        """
        device = self.q.device
        given = self.q if q is None else q
        rows = torch.cat([given, self.q[: max(0, sum(num_queries) - len(given))]])[: sum(num_queries)]
        starts = torch.tensor([0, *num_queries]).cumsum(0)
        batch = AttentionBatch(
            starts.to(device), torch.tensor(self.lens).to(device), self.block_tables, self.block_size
        )
        return rows, self.k_cache, self.v_cache, batch

    def attend(self, num_queries: list[int], *, q: Tensor | None = None) -> Tensor:
        return paged_attention(*self.step(num_queries, q=q), scale=self.scale)


def random_cache(machine: Machine, lens: list[int], *, seed: int) -> Contexts:
    """Of these context lengths, with the heads of the machine's model, in bfloat16."""
    model, block_size = machine.sizes.model, machine.sizes.block_size
    random = random_on(machine, seed=seed)
    num_blocks = [-(-length // block_size) for length in lens]
    shape = (sum(num_blocks), model.num_kv_heads, block_size, model.head_dim)

    order = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(seed))
    tables = torch.zeros(len(lens), max(num_blocks), dtype=torch.int64)
    for table, blocks in zip(tables, order.split(num_blocks), strict=True):
        table[: len(blocks)] = blocks
    return Contexts(
        q=random(lens[0], model.num_heads, model.head_dim),
        k_cache=random(*shape),
        v_cache=random(*shape),
        lens=lens,
        block_tables=tables.to(machine.device),
        block_size=block_size,
        scale=model.head_dim**-0.5,
    )
