"""Memory of several GPUs that each of them can read, as numbers that a kernel can be given. Knows not who made it."""

from dataclasses import dataclass

from torch import Tensor

# Programs that may wait for other ranks at the same time. All of them must fit on a GPU at once, beside nothing else.
MAX_PROGRAMS = 64


@dataclass(frozen=True, slots=True)
class SymmetricMemory:
    """One rank's view. `parts` and `flags` are this rank's own; addresses are those of all ranks' as it sees them.

    A maker (torch.distributed._symmetric_memory, or cudaIpc) allocates both on every rank, zeroes the flags, and waits
    until all ranks have done so. Nobody else writes there.
    """

    rank: int
    num_ranks: int
    parts: Tensor  # [2, capacity], of the dtype that is added; each half begins at a multiple of 16 bytes
    part_addresses: Tensor  # [2, num_ranks] int64, on the device
    flags: Tensor  # [MAX_PROGRAMS, num_ranks] int32: the last call that rank has come to
    flag_addresses: Tensor  # [num_ranks] int64, on the device
