"""Attention: sequences that decode, prompts, and keys and values in float8."""

from collections.abc import Iterator, Mapping

import torch

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
    for num_seqs, context in machine.sizes.float8_decode:
        yield _float8(machine, num_seqs, context)


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


def _float8(machine: Machine, num_seqs: int, context: int) -> Subject:
    """Keys and values with a scale a token and head. The same numbers in bfloat16 stand beside it, as a peer."""
    model = machine.sizes.model

    def make(seed: int) -> Mapping[str, Call]:
        contexts = random_cache(machine, [context] * num_seqs, seed=seed)
        q, k_cache, v_cache, batch = contexts.step([1] * num_seqs)
        narrow = [cache.to(torch.float8_e4m3fn) for cache in (k_cache, v_cache)]
        scales = torch.ones(k_cache.shape[:3], device=machine.device)
        return {
            "llmd": lambda: paged_attention(q, *narrow, batch, scale=contexts.scale, k_scales=scales, v_scales=scales),
            "llmd in bfloat16": lambda: paged_attention(q, k_cache, v_cache, batch, scale=contexts.scale),
        }

    sequences = [(1, context)] * num_seqs
    return Subject(
        f"paged_attention fp8 KV, decode {num_seqs} × {context}",
        make,
        cost.bytes_moved(sequences, model.num_heads, model.num_kv_heads, model.head_dim, itemsize=2, cache_itemsize=1),
        cost.operations(sequences, model.num_heads, model.head_dim),
    )
