"""Attention: sequences that decode, and prompts."""

from collections.abc import Iterator, Mapping

from bench.gpu import peers
from bench.gpu.contexts import random_cache
from bench.gpu.machine import Call, Machine
from bench.gpu.subject import Subject
from llmd_kernels import paged_attention
from llmd_kernels.paged_attention import cost


def subjects(machine: Machine) -> Iterator[Subject]:
    for num_seqs, context in machine.sizes.decode:
        yield _attention(machine, f"paged_attention, decode {num_seqs} × {context}", [context] * num_seqs, 1)
    for length in machine.sizes.prefill:
        yield _attention(machine, f"paged_attention, prefill {length}", [length], length)


def _attention(machine: Machine, name: str, lens: list[int], num_queries: int) -> Subject:
    model = machine.sizes.model
    sequences = [(num_queries, length) for length in lens]

    def make(seed: int) -> Mapping[str, Call]:
        contexts = random_cache(machine, lens, seed=seed)
        step = contexts.step([num_queries] * len(lens))
        return {
            "llmd": lambda: paged_attention(*step, scale=contexts.scale),
            **peers.attention(machine, contexts, step, num_queries=num_queries),
        }

    return Subject(
        name,
        make,
        cost.bytes_moved(sequences, model.num_heads, model.num_kv_heads, model.head_dim, itemsize=2, cache_itemsize=2),
        cost.operations(sequences, model.num_heads, model.head_dim),
    )
