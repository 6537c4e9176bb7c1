"""The proof of `step_inputs` in Triton. Faults, whole outputs and bytes: test_step_inputs_triton.py."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmd_kernels.step_inputs import reference, triton_ops
from llmd_kernels.step_inputs.buffers import SequenceTables, StepInputs, allocate_inputs, allocate_tables
from llmd_kernels.step_inputs.packing import BLOCK_TABLES, TOKEN_IDS, NewEntries, pack_step
from tests.kernels.proof.checks import Case, Configuration, Proof
from tests.kernels.proof.inputs import meta

BLOCK_SIZE = 4
Row = tuple[int, int, int, int, int]


def prepare(module: ModuleType) -> Callable[..., tuple[Tensor, ...]]:
    """All of a step's preparation with the functions of `module`: the tables afterwards, then the inputs."""

    def step_inputs(
        step: Tensor,
        token_ids: Tensor,
        block_tables: Tensor,
        drawn: Tensor,
        *,
        max_rows: int,
        max_tokens: int,
        max_logits: int,
    ) -> tuple[Tensor, ...]:
        tables = SequenceTables(token_ids.clone(), block_tables.clone())
        inputs = used_inputs(max_rows, max_tokens, max_logits)
        module.write_differences(step, tables, max_rows=max_rows)
        module.step_inputs(step, tables, inputs, block_size=BLOCK_SIZE)
        module.append_token_ids(drawn, tables, inputs)
        return (tables.token_ids, tables.block_tables, *tensors_of(inputs))

    return step_inputs


def used_inputs(max_rows: int, max_tokens: int, max_logits: int) -> StepInputs:
    """Full of what an earlier step may have left."""
    inputs = allocate_inputs(max_rows, max_tokens, max_logits, device=torch.device("cpu"))
    for tensor in tensors_of(inputs):
        tensor.fill_(77)
    return inputs


def tensors_of(inputs: StepInputs) -> tuple[Tensor, ...]:
    return tuple(getattr(inputs, name) for name in StepInputs.__dataclass_fields__)


def arguments(
    rows: list[Row],
    new_entries: list[NewEntries],
    *,
    max_rows: int,
    max_tokens: int,
    max_logits: int,
    num_places: int = 6,
    max_len: int = 40,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    packed = pack_step(rows, new_entries, max_rows=max_rows)
    return {
        "step": torch.from_numpy(packed),
        "token_ids": torch.randint(0, 1000, (num_places, max_len), generator=generator, dtype=torch.int32),
        "block_tables": torch.randint(
            0, 1000, (num_places, max_len // BLOCK_SIZE), generator=generator, dtype=torch.int32
        ),
        "drawn": torch.arange(5000, 5000 + max_rows),
        "max_rows": max_rows,
        "max_tokens": max_tokens,
        "max_logits": max_logits,
    }


ROWS: list[Row] = [(4, 0, 3, 2, 1), (1, 9, 1, 0, 1), (2, 6, 7, 0, 0), (0, 39, 1, 0, 1), (5, 3, 2, 1, 1)]
NEW = [
    NewEntries(TOKEN_IDS, 4, 0, [11, 12, 13]),
    NewEntries(BLOCK_TABLES, 4, 0, [70]),
    NewEntries(BLOCK_TABLES, 2, 3, [71, 72]),
    NewEntries(TOKEN_IDS, 3, 5, []),
]


def cases() -> Iterator[Case]:
    yield Case("nothing runs", arguments([], [], max_rows=2, max_tokens=8, max_logits=2))
    yield Case("no padding", arguments(ROWS, NEW, max_rows=5, max_tokens=14, max_logits=7))
    yield Case("much padding", arguments(ROWS, NEW, max_rows=9, max_tokens=300, max_logits=20))
    many: list[Row] = [(place, place, 1, 0, 1 if place % 3 else 0) for place in range(200)]
    given = arguments(many, [], max_rows=256, max_tokens=256, max_logits=256, num_places=201, max_len=208)
    yield Case("more rows than a program has", given)
    prompt = [NewEntries(TOKEN_IDS, 1, 2, np.arange(2500)), NewEntries(BLOCK_TABLES, 1, 0, range(626))]
    long = arguments(
        [(1, 2, 150, 149, 1)], prompt, max_rows=1, max_tokens=152, max_logits=150, num_places=2, max_len=2600
    )
    yield Case("a long prompt", long)


def configurations() -> Iterator[Configuration]:
    device = torch.device("meta")

    def call() -> None:
        tables = allocate_tables(256, 8192, block_size=16, device=device)
        inputs = allocate_inputs(256, 2048, 256, device=device)
        step = meta(10_000, dtype=torch.int32)
        triton_ops.write_differences(step, tables, max_rows=256)
        triton_ops.step_inputs(step, tables, inputs, block_size=16)
        triton_ops.append_token_ids(meta(256, dtype=torch.int64), tables, inputs)

    # All of them: a few kilobytes, one number a thread, and where they lie each row says.
    narrow = {"write_differences_kernel": 0.0, "step_inputs_kernel": 0.0, "append_token_ids_kernel": 0.0}
    yield Configuration("256 rows", call, narrow=narrow)


PROOF = Proof(prepare(triton_ops), prepare(reference), list(cases()), [], list(configurations()))
