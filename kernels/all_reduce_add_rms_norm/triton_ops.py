"""`all_reduce_add_rms_norm` in Triton, one launch a rank: lay the part out, meet the other ranks, read their parts.

A program meets the program of the same number on every rank, and both work on the same rows, so nobody waits for more.
There is no meeting at the end: the next call uses the other half, and its meeting shows that all have read this one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.all_reduce_add_rms_norm.symmetric_memory import MAX_PROGRAMS, SymmetricMemory
from llmd_kernels.rms_norm.triton_ops import normalized
from llmd_kernels.target import at_most


def all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    memory: SymmetricMemory,
    turn: int,
    *,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The sum is rounded to its dtype before it is normalized in float32.

    x and residual may also be those of several ranks one behind another, [ranks · T, H] from memory.rank on, with all
    their parts and flags in `memory`: so one GPU, or a test, stands for several.
    """
    num_local_ranks = memory.flags.shape[0] // MAX_PROGRAMS
    num_rows, hidden_size = x.shape[0] // num_local_ranks, x.shape[1]
    capacity = memory.parts.shape[1] // num_local_ranks
    if num_rows * hidden_size > capacity:
        raise ValueError(f"{num_rows} × {hidden_size} numbers do not fit in symmetric memory for {capacity}")
    x, residual = x.contiguous(), residual.contiguous()
    normed, new_residual = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    num_warps = 4 if hidden_size <= 4096 else 16
    if num_rows:
        all_reduce_add_rms_norm_kernel[(min(num_rows, MAX_PROGRAMS), num_local_ranks)](
            x,
            residual,
            weight,
            normed,
            new_residual,
            memory.parts[turn],
            memory.part_addresses[turn],
            memory.flags,
            memory.flag_addresses,
            memory.rank,
            num_rows,
            capacity,
            eps,
            weight_offset,
            NUM_RANKS=memory.num_ranks,
            MAX_PROGRAMS=MAX_PROGRAMS,
            HIDDEN=hidden_size,
            BLOCK=triton.next_power_of_2(hidden_size),
            num_warps=num_warps,
            **at_most(255 if num_warps == 4 else 128),
        )
    return normed, new_residual


@triton.jit(do_not_specialize=["first_rank", "num_rows"])
def all_reduce_add_rms_norm_kernel(
    x,
    residual,
    weight,
    normed,
    new_residual,
    parts,
    part_addresses,
    flags,
    flag_addresses,
    first_rank,
    num_rows,
    capacity,
    eps,
    weight_offset,
    NUM_RANKS: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, residual [local ranks · num_rows, HIDDEN] → normed, new_residual. Grid: (programs, local ranks)."""
    program, local_rank = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = columns < HIDDEN
    first = local_rank.to(tl.int64) * num_rows
    own_parts = parts + local_rank.to(tl.int64) * capacity
    for row in range(program, num_rows, tl.num_programs(0)):
        part = tl.load(x + (first + row) * HIDDEN + columns, mask=mask, other=0.0)
        tl.store(own_parts + row * HIDDEN + columns, part, mask=mask)
    own_flags = flags + (local_rank * MAX_PROGRAMS + program) * NUM_RANKS
    meet(own_flags, flag_addresses, first_rank + local_rank, program, NUM_RANKS)
    for row in range(program, num_rows, tl.num_programs(0)):
        total = tl.zeros([1, BLOCK], tl.float32)
        for rank in tl.static_range(NUM_RANKS):
            address = tl.load(part_addresses + rank).to(tl.pointer_type(parts.dtype.element_ty))
            part = tl.load(tl.multiple_of(address, 16) + row * HIDDEN + columns, mask=mask, other=0.0)
            total += part.to(tl.float32)
        places = (first + row) * HIDDEN + columns
        total += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(new_residual.dtype.element_ty)
        tl.store(new_residual + places, rounded, mask=mask)
        result = normalized(rounded.to(tl.float32), weight, columns, eps, weight_offset, HIDDEN)
        tl.store(normed + places, result, mask=mask)


@triton.jit
def meet(own_flags, flag_addresses, rank, program, NUM_RANKS: tl.constexpr):
    """Return once this program has come here on every rank; what they stored before can then be loaded.

    own_flags [NUM_RANKS]: how often each rank has come here, as it has told this one. A rank may be one call ahead.
    """
    call = tl.load(own_flags + rank) + 1
    # All threads' stores, and their look at the own flag, come before any flag is set.
    tl.debug_barrier()
    for other in tl.static_range(NUM_RANKS):
        theirs = tl.load(flag_addresses + other).to(tl.pointer_type(tl.int32)) + program * NUM_RANKS + rank
        tl.atomic_xchg(theirs, call, sem="release", scope="sys")
    for other in tl.static_range(NUM_RANKS):
        # The difference, so that calls may be counted beyond 2³¹.
        while tl.atomic_add(own_flags + other, 0, sem="acquire", scope="sys") - call < 0:
            pass
    # All threads' loads come after the flags of the others.
    tl.debug_barrier()
