"""The end of a layer that is cut over ranks: their parts added up, the residual stream, and the norm, as one."""

from torch import Tensor
from torch.distributed import ProcessGroup

from llmd_kernels.all_reduce_add_rms_norm import torch_ops
from llmd_kernels.all_reduce_add_rms_norm.symmetric_memory import SymmetricMemory

__all__ = ["SymmetricMemory", "all_reduce_add_rms_norm"]


def all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    ranks: SymmetricMemory | ProcessGroup,
    turn: int = 0,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """x [T, H], this rank's part; residual [T, H], weight [H], the same on all ranks → (normed, new_residual) [T, H].

    new_residual = residual + (x of rank 0 + x of rank 1 + …), added in float32 in the order of the ranks, rounded once;
    normed = `rms_norm` of it. Every rank must call it with the same T, and gets the same bits.

    With a process group the parts are gathered, on any device; with symmetric memory (GPUs, 16-bit floats) each rank
    reads the others' parts itself in one launch. Then `turn` must be 0 and 1 by turns, from call to call of one
    SymmetricMemory and over the replays of a recorded step: it says which half holds the parts, while another rank may
    still read those of the call before. Raises ValueError if T · H numbers do not fit in a half.
    """
    if isinstance(ranks, SymmetricMemory):
        from llmd_kernels.all_reduce_add_rms_norm import triton_ops

        return triton_ops.all_reduce_add_rms_norm(x, residual, weight, eps, ranks, turn, weight_offset=weight_offset)
    return torch_ops.all_reduce_add_rms_norm(x, residual, weight, eps, ranks, weight_offset=weight_offset)
