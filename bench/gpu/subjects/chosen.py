"""What a mixture of experts adds to a layer: the router's choice and the experts, at the sizes of Qwen3-30B-A3B."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.contexts import random_on
from bench.gpu.machine import Call, Machine
from bench.gpu.subject import Subject
from llmd_kernels import experts, pack_float4_weight, route
from llmd_kernels.experts import cost as experts_cost
from llmd_kernels.route import cost as route_cost


def subjects(machine: Machine) -> Iterator[Subject]:
    for num_tokens in machine.sizes.expert_tokens:
        yield _route(machine, num_tokens)
        yield _experts(machine, num_tokens)
    for num_tokens in machine.sizes.expert_tokens:
        yield _float4_experts(machine, num_tokens)


def _route(machine: Machine, num_tokens: int) -> Subject:
    sizes = machine.sizes.experts

    def make(seed: int) -> Mapping[str, Call]:
        logits = random_on(machine, seed=seed)(num_tokens, sizes.num_experts)
        return {
            "llmd": lambda: route(logits, num_chosen=sizes.num_chosen, scoring="softmax", renormalize=True),
            "torch": lambda: _plain_route(logits, sizes.num_chosen),
        }

    return Subject(
        f"route, {num_tokens} tokens",
        make,
        route_cost.bytes_moved(num_tokens, sizes.num_experts, sizes.num_chosen, itemsize=2),
        route_cost.operations(num_tokens, sizes.num_experts, sizes.num_chosen),
    )


def _plain_route(logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    weights, expert_ids = logits.float().softmax(dim=-1).topk(num_chosen, dim=-1)
    return expert_ids, weights / weights.sum(dim=-1, keepdim=True)


def _experts(machine: Machine, num_tokens: int) -> Subject:
    """Every token has other experts, as many as there are: weights of all that can be chosen are read."""
    sizes = machine.sizes.experts
    # token t's are t·C … t·C + C - 1, modulo the experts: the host knows them too
    choices = torch.arange(num_tokens * sizes.num_chosen).view(num_tokens, -1) % sizes.num_experts

    def make(seed: int) -> Mapping[str, Call]:
        random = random_on(machine, seed=seed)
        x = random(num_tokens, sizes.hidden)
        gate_up = random(sizes.num_experts, 2 * sizes.intermediate, sizes.hidden) / sizes.hidden**0.5
        down = random(sizes.num_experts, sizes.hidden, sizes.intermediate) / sizes.intermediate**0.5
        weights = torch.full(choices.shape, 1 / sizes.num_chosen, device=machine.device)
        expert_ids = choices.int().to(machine.device)
        groups = _groups(machine, choices, sizes.num_experts)
        return {
            "llmd": lambda: experts(x, expert_ids, weights, gate_up, down, activation="silu"),
            "loop of torch.mm": lambda: _loop(x, weights, gate_up, down, groups),
        }

    num_distinct = min(num_tokens * sizes.num_chosen, sizes.num_experts)
    return Subject(
        f"experts, {num_tokens} tokens",
        make,
        experts_cost.bytes_moved(
            num_tokens, sizes.num_chosen, num_distinct, sizes.hidden, sizes.intermediate, itemsize=2
        ),
        experts_cost.operations(num_tokens, sizes.num_chosen, sizes.hidden, sizes.intermediate),
    )


def _float4_experts(machine: Machine, num_tokens: int) -> Subject:
    """The same in MXFP4. Codes and exponents are random: no time depends on them."""
    sizes = machine.sizes.experts
    choices = torch.arange(num_tokens * sizes.num_chosen).view(num_tokens, -1) % sizes.num_experts

    def make(seed: int) -> Mapping[str, Call]:
        x = random_on(machine, seed=seed)(num_tokens, sizes.hidden)
        gate_up, down = (
            pack_float4_weight(
                torch.randint(16, shape, dtype=torch.uint8, device=machine.device),
                torch.full((shape[0], shape[1] // 32), 120, dtype=torch.uint8, device=machine.device),
            )
            for shape in (
                (sizes.num_experts * 2 * sizes.intermediate, sizes.hidden),
                (sizes.num_experts * sizes.hidden, sizes.intermediate),
            )
        )
        weights = torch.full(choices.shape, 1 / sizes.num_chosen, device=machine.device)
        expert_ids = choices.int().to(machine.device)
        return {"llmd": lambda: experts(x, expert_ids, weights, gate_up, down, activation="silu")}

    num_distinct = min(num_tokens * sizes.num_chosen, sizes.num_experts)
    num_weights = num_distinct * 3 * sizes.hidden * sizes.intermediate
    of_numbers = experts_cost.bytes_moved(
        num_tokens, sizes.num_chosen, num_distinct, sizes.hidden, sizes.intermediate, itemsize=2
    )
    return Subject(
        f"experts in MXFP4, {num_tokens} tokens",
        make,
        # 4 bits and an exponent for 32 numbers instead of 16 bits
        of_numbers - 2 * num_weights + num_weights // 2 + num_weights // 32,
        experts_cost.operations(num_tokens, sizes.num_chosen, sizes.hidden, sizes.intermediate),
    )


def _groups(machine: Machine, choices: Tensor, num_experts: int) -> list[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, which of their choices it is), of the experts that are chosen."""
    groups = []
    for expert in range(num_experts):
        tokens, which = (choices == expert).nonzero(as_tuple=True)
        if len(tokens):
            groups.append((expert, tokens.to(machine.device), which.to(machine.device)))
    return groups


def _loop(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, groups: list[tuple[int, Tensor, Tensor]]
) -> Tensor:
    """Flattered: somebody has told the host who is chosen by whom."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, tokens, which in groups:
        gate, up = torch.mm(x[tokens], gate_up[expert].t()).chunk(2, dim=-1)
        of_expert = torch.mm(F.silu(gate) * up, down[expert].t())
        y.index_add_(0, tokens, of_expert * weights[tokens, which][:, None])
    return y.to(x.dtype)
