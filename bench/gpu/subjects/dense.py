"""What works on rows: norm, activation, rope with cache write, matrix products."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.contexts import random_on
from bench.gpu.machine import Call, Machine
from bench.gpu.subject import Subject
from llmd_kernels import add_rms_norm, gated_mul, linear, rope_kv_write
from llmd_kernels.add_rms_norm import cost as norm_cost
from llmd_kernels.gated_mul import cost as gate_cost
from llmd_kernels.linear import cost as linear_cost
from llmd_kernels.rope_kv_write import cost as rope_cost
from llmd_kernels.rope_kv_write import torch_ops as rope_torch

EPS = 1e-5


def subjects(machine: Machine) -> Iterator[Subject]:
    for num_tokens in machine.sizes.small_tokens:
        yield _norm(machine, num_tokens)
        yield _gate(machine, num_tokens)
        yield _rope(machine, num_tokens)
    for name in machine.sizes.model.linears:
        for num_tokens in machine.sizes.linear_tokens:
            yield _linear(machine, name, num_tokens)


def _norm(machine: Machine, num_tokens: int) -> Subject:
    hidden = machine.sizes.model.hidden
    compiled = machine.compiled(_plain_norm)

    def make(seed: int) -> Mapping[str, Call]:
        random = random_on(machine, seed=seed)
        x, residual, weight = random(num_tokens, hidden), random(num_tokens, hidden), random(hidden)
        return {
            "llmd": lambda: add_rms_norm(x, residual, weight, EPS),
            "torch.compile": lambda: compiled(x, residual, weight),
        }

    return Subject(
        f"add_rms_norm, {num_tokens} tokens",
        make,
        norm_cost.bytes_moved(num_tokens, hidden, itemsize=2),
        norm_cost.operations(num_tokens, hidden),
    )


def _plain_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS)
    return normed.to(x.dtype) * weight, total


def _gate(machine: Machine, num_tokens: int) -> Subject:
    size = machine.sizes.model.intermediate
    compiled = machine.compiled(_plain_gate)

    def make(seed: int) -> Mapping[str, Call]:
        gate_up = random_on(machine, seed=seed)(num_tokens, 2 * size)
        return {"llmd": lambda: gated_mul(gate_up, "silu"), "torch.compile": lambda: compiled(gate_up)}

    return Subject(
        f"gated_mul silu, {num_tokens} tokens",
        make,
        gate_cost.bytes_moved(num_tokens, size, itemsize=2),
        gate_cost.operations(num_tokens, size),
    )


def _plain_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _rope(machine: Machine, num_tokens: int) -> Subject:
    model, block_size = machine.sizes.model, machine.sizes.block_size
    num_blocks = -(-num_tokens // block_size)

    def make(seed: int) -> Mapping[str, Call]:
        random = random_on(machine, seed=seed)
        caches = [random(num_blocks, model.num_kv_heads, block_size, model.head_dim) for _ in range(2)]
        arguments: dict[str, Any] = {
            "qkv": random(num_tokens, model.qkv),
            "positions": torch.arange(num_tokens, device=machine.device),
            "slots": torch.randperm(num_blocks * block_size, device=machine.device)[:num_tokens],
            "k_cache": caches[0],
            "v_cache": caches[1],
            "num_heads": model.num_heads,
            "num_kv_heads": model.num_kv_heads,
            "cos_sin": random(num_tokens, model.head_dim).float(),
        }
        return {
            "llmd": lambda: rope_kv_write(**arguments),
            "torch": lambda: rope_torch.rope_kv_write(**arguments),
        }

    heads = (model.num_heads, model.num_kv_heads)
    return Subject(
        f"rope_kv_write, {num_tokens} tokens",
        make,
        rope_cost.bytes_moved(num_tokens, *heads, model.head_dim, rot_dim=model.head_dim, itemsize=2, cache_itemsize=2),
        rope_cost.operations(num_tokens, *heads, rot_dim=model.head_dim),
    )


def _linear(machine: Machine, name: str, num_tokens: int) -> Subject:
    num_inputs, num_outputs = machine.sizes.model.linears[name]

    def make(seed: int) -> Mapping[str, Call]:
        random = random_on(machine, seed=seed)
        x, weight = random(num_tokens, num_inputs), random(num_outputs, num_inputs)
        return {"llmd": lambda: linear(x, weight), "cuBLAS": lambda: torch.mm(x, weight.t())}

    return Subject(
        f"linear {name}, {num_tokens} tokens",
        make,
        linear_cost.bytes_moved(num_tokens, num_inputs, num_outputs, itemsize=2),
        linear_cost.operations(num_tokens, num_inputs, num_outputs),
    )
