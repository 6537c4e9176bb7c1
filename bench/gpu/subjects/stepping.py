"""What a step needs around the layers: its inputs, attention's work list, and the sum over ranks."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bench.gpu.contexts import random_on
from bench.gpu.machine import Call, Machine
from bench.gpu.subject import Subject
from llmd_kernels import (
    LayerKind,
    SymmetricMemory,
    add_rms_norm,
    all_reduce_add_rms_norm,
    allocate_inputs,
    allocate_tables,
    allocate_work,
    pack_step,
    step_inputs,
    write_differences,
)
from llmd_kernels.all_reduce_add_rms_norm import cost as sum_cost
from llmd_kernels.all_reduce_add_rms_norm.symmetric_memory import MAX_PROGRAMS
from llmd_kernels.step_inputs import cost as inputs_cost

EPS = 1e-5
NUM_RANKS = 2


def subjects(machine: Machine) -> Iterator[Subject]:
    for num_seqs in machine.sizes.step_sequences:
        yield _step_inputs(machine, num_seqs)
        # Its programs wait for one another, which one CPU thread cannot do for all of them.
        if machine.device.type != "cpu":
            yield _sum_over_ranks(machine, num_seqs)


def _step_inputs(machine: Machine, num_seqs: int) -> Subject:
    """A decode step's, with its work list: what a captured step begins with."""
    model, block_size, context = machine.sizes.model, machine.sizes.block_size, machine.sizes.step_context
    device = machine.device

    def make(seed: int) -> Mapping[str, Call]:
        tables = allocate_tables(num_seqs, context, block_size=block_size, device=device)
        inputs = allocate_inputs(num_seqs, num_seqs, num_seqs, device=device)
        kind = LayerKind(model.num_heads, model.num_kv_heads, model.head_dim)
        work_lists = allocate_work(
            [kind],
            max_seqs=num_seqs,
            max_tokens=num_seqs,
            max_len=context,
            block_size=block_size,
            q_dtype=torch.bfloat16,
            cache_dtype=torch.bfloat16,
            device=device,
        )
        packed = pack_step([(place, context - 1, 1, 0, 1) for place in range(num_seqs)], [], max_rows=num_seqs)
        step = torch.from_numpy(packed).to(device)

        def call() -> None:
            write_differences(step, tables, max_rows=num_seqs)
            step_inputs(step, tables, inputs, block_size=block_size, work_lists=work_lists)

        return {"llmd": call}

    return Subject(
        f"step_inputs and work list, {num_seqs} × {context}",
        make,
        inputs_cost.bytes_moved(num_seqs, max_rows=num_seqs, max_tokens=num_seqs, max_logits=num_seqs),
        0,
    )


def _sum_over_ranks(machine: Machine, num_tokens: int) -> Subject:
    """All ranks in one launch, in this device's memory: what the kernel costs without the links between devices."""
    hidden = machine.sizes.model.hidden

    def make(seed: int) -> Mapping[str, Call]:
        random = random_on(machine, seed=seed)
        x, residual = random(NUM_RANKS * num_tokens, hidden), random(num_tokens, hidden).repeat(NUM_RANKS, 1)
        weight = random(hidden)
        memory = memory_of_all(machine, num_tokens * hidden)
        return {
            "llmd": lambda: all_reduce_add_rms_norm(x, residual, weight, EPS, ranks=memory),
            "add and add_rms_norm": lambda: _one_after_the_other(x, residual, weight),
        }

    return Subject(
        f"all_reduce_add_rms_norm {NUM_RANKS} ranks, {num_tokens} tokens",
        make,
        NUM_RANKS * sum_cost.bytes_moved(num_tokens, hidden, NUM_RANKS, itemsize=2),
        0,
    )


def _one_after_the_other(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What follows a sum that somebody else has made, on each rank."""
    total = x.view(NUM_RANKS, -1, x.shape[1]).sum(dim=0).repeat(NUM_RANKS, 1)
    return add_rms_norm(total, residual, weight, EPS)


def memory_of_all(machine: Machine, capacity: int) -> SymmetricMemory:
    """All ranks' memory, in one."""
    parts = torch.zeros(2, NUM_RANKS, capacity, dtype=torch.bfloat16, device=machine.device)
    flags = torch.zeros(NUM_RANKS, MAX_PROGRAMS, NUM_RANKS, dtype=torch.int32, device=machine.device)
    return SymmetricMemory(
        rank=0,
        num_ranks=NUM_RANKS,
        parts=parts.view(2, -1),
        part_addresses=torch.tensor([[part.data_ptr() for part in half] for half in parts], device=machine.device),
        flags=flags.view(-1, NUM_RANKS),
        flag_addresses=torch.tensor([own.data_ptr() for own in flags], device=machine.device),
    )
