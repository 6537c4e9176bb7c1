"""How a parameter is cut over tensor-parallel ranks, as data. Pure arithmetic: no tensors, no files, no communication.

Every rank gets whole units (a KV head with its queries, a few columns of an MLP), as evenly as whole units allow:
9 heads over 3 KV heads on 2 ranks are 3 and 6 heads.
"""

from dataclasses import dataclass
from math import prod

from llmd.errors import UnsupportedModel

FLOAT32_BYTES = 4
MXFP4_BLOCK = 32  # numbers that share a scale, packed two a byte


@dataclass(frozen=True, slots=True)
class Shard:
    """Cut along `dim` (0: rows, the outputs; 1: columns, the inputs), never inside a unit."""

    dim: int
    unit: int  # rows or columns


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank has all of it."""


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `size` tensor-parallel ranks."""

    index: int = 0
    size: int = 1


ONE_RANK = Rank()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertView:
    """One expert's matrix or bias in a tensor that has those of all experts, one behind the other."""

    expert: int  # its place along the tensor's first dimension
    shape: tuple[int, ...]  # of the matrix [num_outputs, num_inputs] or bias [num_outputs] that is meant
    transposed: bool = False  # it is kept as [num_inputs, num_outputs]
    first_row: int = 0
    row_step: int = 1  # 2: the rows of two matrices alternate
    mxfp4: bool = False  # two tensors: `…_blocks` of codes, the first of a byte in its low bits, and `…_scales`


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one tensor of the checkpoint gives to a parameter.

    With `Shard`: unit u is what lies at start + u · pitch along the sharded dimension. So a piece may also be every
    n-th group of rows, as the queries, keys and values are in a projection that keeps them by KV head. All that is
    said of the tensor's rows and columns is meant of the view's, where there is one.
    """

    tensor: str  # its name in the checkpoint
    tensor_shape: tuple[int, ...]  # there, whole
    sharding: Shard | Replicated
    num_units: int = 1
    start: int = 0
    pitch: int = 0
    view: ExpertView | None = None

    @property
    def is_mxfp4(self) -> bool:
        return self.view is not None and self.view.mxfp4

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The names and whole shapes of what it is read from."""
        if not self.is_mxfp4:
            return {self.tensor: self.tensor_shape}
        *rows, num_inputs = self.tensor_shape
        blocks = (*rows, num_inputs // MXFP4_BLOCK, MXFP4_BLOCK // 2)
        return {f"{self.tensor}_blocks": blocks, f"{self.tensor}_scales": blocks[:-1]}

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Of the tensor, or of the view of it."""
        return self.tensor_shape if self.view is None else self.view.shape

    def slices(self, rank: Rank) -> list[slice]:
        """The parts of the tensor that this rank needs, along the sharded dimension, in order; longest runs."""
        if isinstance(self.sharding, Replicated):
            return [slice(0, self.matrix_shape[0])]
        unit = self.sharding.unit
        units = units_of(rank, self.num_units, self.tensor)
        if self.pitch == unit:
            return [slice(self.start + units.start * unit, self.start + units.stop * unit)]
        return [slice(self.start + u * self.pitch, self.start + u * self.pitch + unit) for u in units]

    def shape(self, rank: Rank) -> tuple[int, ...]:
        """The shape of this rank's part."""
        if isinstance(self.sharding, Replicated):
            return self.matrix_shape
        shape = list(self.matrix_shape)
        shape[self.sharding.dim] = sum(s.stop - s.start for s in self.slices(rank))
        return tuple(shape)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor of the decoder: its pieces, one below the other (joined along dimension 0).

    num_experts: where it is a stack of as many equal matrices, which have the pieces in turn.
    in_float32: whatever the model's dtype is.
    """

    name: str
    pieces: tuple[Piece, ...]
    num_experts: int | None = None
    in_float32: bool = False

    def shape(self, rank: Rank) -> tuple[int, ...]:
        num_stacked = 1 if self.num_experts is None else self.num_experts
        shapes = [piece.shape(rank) for piece in self.pieces[: len(self.pieces) // num_stacked]]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return shape if self.num_experts is None else (self.num_experts, *shape)

    def matrix_shape(self, rank: Rank) -> tuple[int, int]:
        """(rows, columns) of a matrix, or of a stack's matrices one below the other."""
        *rows, num_columns = self.shape(rank)
        return prod(rows), num_columns

    def num_elements(self, rank: Rank) -> int:
        return prod(self.shape(rank))

    def num_bytes(self, rank: Rank, dtype_bytes: int) -> int:
        """dtype_bytes: of an element in the model's dtype."""
        return self.num_elements(rank) * (FLOAT32_BYTES if self.in_float32 else dtype_bytes)


def units_of(rank: Rank, num_units: int, what: str) -> range:
    """The units of this rank. Raises UnsupportedModel where a rank would have none."""
    if num_units < rank.size:
        raise UnsupportedModel(f"{what} has {num_units} units and cannot be split over {rank.size} ranks")
    return range(num_units * rank.index // rank.size, num_units * (rank.index + 1) // rank.size)


def whole(tensor: str, *shape: int) -> Piece:
    """A tensor that every rank has."""
    return Piece(tensor=tensor, tensor_shape=shape, sharding=Replicated())


def split(tensor: str, *shape: int, dim: int, unit: int) -> Piece:
    """A tensor that is cut along `dim` in whole units."""
    return Piece(tensor=tensor, tensor_shape=shape, sharding=Shard(dim, unit), num_units=shape[dim] // unit, pitch=unit)
