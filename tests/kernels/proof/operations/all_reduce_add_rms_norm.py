"""The proof of `all_reduce_add_rms_norm` in Triton: one launch stands for all ranks, which wait for each other."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmd_kernels.all_reduce_add_rms_norm import SymmetricMemory, cost, reference, triton_ops
from llmd_kernels.all_reduce_add_rms_norm.symmetric_memory import MAX_PROGRAMS
from tests.kernels.proof.checks import Case, Configuration, Proof, Rows
from tests.kernels.proof.inputs import FLOATS, dtype_name, meta, randn
from tests.kernels.proof.interpreter import interpreted


def memory_of_all(num_ranks: int, capacity: int, dtype: torch.dtype, device: torch.device) -> SymmetricMemory:
    """All ranks' memory, in one."""
    parts = torch.empty(2, num_ranks, capacity, dtype=dtype, device=device)
    flags = torch.zeros(num_ranks, MAX_PROGRAMS, num_ranks, dtype=torch.int32, device=device)
    return SymmetricMemory(
        rank=0,
        num_ranks=num_ranks,
        parts=parts.view(2, -1),
        part_addresses=torch.tensor([[part.data_ptr() for part in half] for half in parts], device=device),
        flags=flags.view(-1, num_ranks),
        flag_addresses=torch.tensor([own.data_ptr() for own in flags], device=device),
    )


def all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    memory: SymmetricMemory | None = None,
    turn: int = 0,
    ops: Any = triton_ops,
) -> tuple[Tensor, Tensor]:
    """As the reference: x [R, T, H] → what rank 0 gets. All ranks must get the same bits."""
    num_ranks, num_rows, hidden_size = x.shape
    results: tuple[Tensor, Tensor] = ops.all_reduce_add_rms_norm(
        x.reshape(num_ranks * num_rows, hidden_size),
        residual.repeat(num_ranks, 1),
        weight,
        eps,
        memory or memory_of_all(num_ranks, -(-num_rows * hidden_size // 8) * 8, x.dtype, x.device),
        turn,
        weight_offset=weight_offset,
    )
    normed, new_residual = (result.view(num_ranks, num_rows, hidden_size) for result in results)
    for result in (normed, new_residual):
        for rank in range(1, num_ranks):
            assert torch.equal(result[rank].float().nan_to_num(), result[0].float().nan_to_num())
    return normed[0], new_residual[0]


def arguments(num_ranks: int, num_rows: int, hidden_size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": randn(num_ranks, num_rows, hidden_size, dtype=dtype),
        "residual": randn(num_rows, hidden_size, dtype=dtype, seed=1),
        "weight": randn(hidden_size, dtype=dtype, seed=2),
        "eps": 1e-5,
    }


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        for num_ranks, num_rows, hidden_size in ((2, 0, 64), (2, 1, 1), (3, 5, 40), (4, 2, 100)):
            yield Case(
                f"{dtype_name(dtype)} {num_ranks} ranks, {num_rows}×{hidden_size}",
                arguments(num_ranks, num_rows, hidden_size, dtype) | {"weight_offset": float(num_ranks == 3)},
                outputs=["normed", "new_residual"] if num_rows else [],
                in_turns=True,
            )
    yield Case(
        "more rows than programs",
        arguments(2, MAX_PROGRAMS + 3, 8, torch.bfloat16),
        outputs=["normed", "new_residual"],
        in_turns=True,
    )
    yield Case(
        "moves",
        arguments(4, 2, 2000, torch.bfloat16),
        bytes_moved=4 * cost.bytes_moved(2, 2000, 4, itemsize=2),
        shared_inputs=["weight", "flags", "flag_addresses", "part_addresses"],
        in_turns=True,
    )


def rows(num_ranks: int) -> Rows:
    given = arguments(num_ranks, 5, 70, torch.bfloat16)

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        with interpreted(in_turns=True):
            return all_reduce_add_rms_norm(given["x"][:, ids], given["residual"][ids], given["weight"], 1e-5)

    return Rows(f"{num_ranks} ranks", 5, run)


def configurations() -> Iterator[Configuration]:
    for hidden_size in (2880, 4096, 8192):
        for num_ranks in (2, 4, 8):
            for dtype in (torch.bfloat16, torch.float16):

                def call(
                    hidden_size: int = hidden_size, num_ranks: int = num_ranks, dtype: torch.dtype = dtype
                ) -> None:
                    x, weight = meta(64, hidden_size, dtype=dtype), meta(hidden_size, dtype=dtype)
                    memory = SymmetricMemory(
                        rank=1,
                        num_ranks=num_ranks,
                        parts=meta(2, 64 * hidden_size, dtype=dtype),
                        part_addresses=meta(2, num_ranks, dtype=torch.int64),
                        flags=meta(MAX_PROGRAMS, num_ranks, dtype=torch.int32),
                        flag_addresses=meta(num_ranks, dtype=torch.int64),
                    )
                    triton_ops.all_reduce_add_rms_norm(x, x, weight, 1e-5, memory, 0)

                yield Configuration(f"{dtype_name(dtype)} {num_ranks} ranks, {hidden_size}", call)


PROOF = Proof(
    all_reduce_add_rms_norm,
    reference.all_reduce_add_rms_norm,
    list(cases()),
    [rows(2), rows(3)],
    list(configurations()),
)
