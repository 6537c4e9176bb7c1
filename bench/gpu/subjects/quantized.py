"""Products with quantised weights, beside cuBLAS with the same numbers in bfloat16."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bench.gpu.contexts import random_on
from bench.gpu.machine import Call, Machine
from bench.gpu.subject import Subject
from llmd_kernels import Float8Weight, QuantizedWeight, dequantized, linear, pack_int_weight
from llmd_kernels.quantized_linear import cost

GROUP_SIZE = 128  # inputs that share a scale; with float8 also outputs
KINDS = {"int4": 4, "int8": 8, "fp8": 8}  # bits of a weight


def subjects(machine: Machine) -> Iterator[Subject]:
    for name in machine.sizes.quantized_linears:
        for num_tokens in machine.sizes.quantized_tokens:
            for kind in KINDS:
                yield _linear(machine, kind, name, num_tokens)


def _linear(machine: Machine, kind: str, name: str, num_tokens: int) -> Subject:
    num_inputs, num_outputs = machine.sizes.model.linears[name]
    num_groups = -(-num_inputs // GROUP_SIZE)
    # A scale and a zero for each output, or a float32 for each block.
    num_scales = (-(-num_outputs // GROUP_SIZE) if kind == "fp8" else num_outputs) * num_groups

    def make(seed: int) -> Mapping[str, Call]:
        x = random_on(machine, seed=seed)(num_tokens, num_inputs)
        weight = random_weight(machine, kind, num_outputs, num_inputs, seed=seed)
        # All calls of a peer may read the same matrix where it is larger than the cache; sets rotate nevertheless.
        plain = dequantized(weight, torch.bfloat16)
        return {"llmd": lambda: linear(x, weight), "cuBLAS bfloat16": lambda: torch.mm(x, plain.t())}

    return Subject(
        f"quantized_linear {kind} {name}, {num_tokens} tokens",
        make,
        cost.bytes_moved(num_tokens, num_inputs, num_outputs, bits=KINDS[kind], scale_bytes=4 * num_scales, itemsize=2),
        cost.operations(num_tokens, num_inputs, num_outputs),
    )


def random_weight(machine: Machine, kind: str, num_outputs: int, num_inputs: int, *, seed: int) -> QuantizedWeight:
    generator = torch.Generator(machine.device).manual_seed(seed)
    shape = (num_outputs, num_inputs)
    if kind == "fp8":
        values = torch.empty(shape, device=machine.device).uniform_(-1, 1, generator=generator)
        sizes = [-(-size // GROUP_SIZE) for size in shape]
        scales = torch.ones(sizes, device=machine.device)
        return Float8Weight(values.to(torch.float8_e4m3fn), scales, (GROUP_SIZE, GROUP_SIZE))
    integers = torch.empty(shape, dtype=torch.uint8, device=machine.device)
    integers.random_(2 ** KINDS[kind], generator=generator)
    return pack_int_weight(integers, _ones(machine, num_outputs, num_inputs), None, bits=4 if kind == "int4" else 8)


def _ones(machine: Machine, num_outputs: int, num_inputs: int) -> Tensor:
    return torch.ones(num_outputs, -(-num_inputs // GROUP_SIZE), dtype=torch.bfloat16, device=machine.device)
