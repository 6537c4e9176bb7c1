"""`all_reduce_add_rms_norm` with a process group: parts gathered, then added in the order of the ranks."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from llmd_kernels.rms_norm import rms_norm


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: ProcessGroup, *, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As many numbers as there are ranks come to each of them; what adds on the way has an order of its own."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    total = parts[0].to(torch.promote_types(x.dtype, torch.float32))
    for part in parts[1:]:
        total = total + part
    new_residual = (total + residual).to(residual.dtype)
    return rms_norm(new_residual, weight, eps, weight_offset=weight_offset), new_residual
