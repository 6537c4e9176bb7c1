"""Quantised weights out of a checkpoint: unpacked to one number an entry, and dequantised.

`quantized_layouts` says which tensors there are; `quantized_packing` packs them for the kernels. Knows no model and no
memory limits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmd.errors import UnsupportedModel
from llmd.model.expert_views import viewed
from llmd.model.parallel import MXFP4_BLOCK, Piece, Rank
from llmd.model.quantization import WeightScheme
from llmd.model.quantized_layouts import Axis, StoredPart, cuts, entries, module_of, stored_weight
from llmd_kernels import float4_numbers

# In AutoAWQ's words the lowest 4 bits are of output 0, then 2, 4, 6, 1, 3, 5, 7: where output i of a word is.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class UnpackedWeight:
    """A rank's part of a weight: scales[n, group of k] · (values[n, k] − zeros[n, group of k]).

    MXFP4 has codes for values and exponents for scales, as `float4_numbers` reads them.
    """

    values: Tensor  # uint8 or float8_e4m3fn [N, K]
    scales: Tensor  # float, of MXFP4 uint8 [N, num_groups]
    zeros: Tensor | None  # uint8 [N, num_groups]; None: 2^(bits − 1), for float8 and MXFP4 0
    groups: Tensor | None  # int64 [K]: the group of each input; None: one group after the other

    def part_of_rows(self, rows: slice) -> "UnpackedWeight":
        """Some of the outputs."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return UnpackedWeight(self.values[rows], self.scales[rows], zeros, self.groups)

    def above(self, other: "UnpackedWeight") -> "UnpackedWeight":
        """With the outputs of another weight of the same inputs below."""
        zeros = None if self.zeros is None or other.zeros is None else torch.cat((self.zeros, other.zeros))
        values, scales = torch.cat((self.values, other.values)), torch.cat((self.scales, other.scales))
        return UnpackedWeight(values, scales, zeros, self.groups)


def unpack(
    piece: Piece, scheme: WeightScheme, *, tensors: Mapping[str, Tensor], rank: Rank, device: torch.device
) -> UnpackedWeight:
    """What this rank needs of a piece that `check_tensors` has found well.

    tensors: those of the checkpoint, by name. Raises UnsupportedModel where ranks would have parts of groups.
    """
    if piece.is_mxfp4:
        return _unpack_mxfp4(piece, tensors=tensors, rank=rank, device=device)
    weight = stored_weight(scheme)
    source = _Source(piece, scheme, tensors, *cuts(piece, rank))
    groups = None if weight.groups is None else source.shuffled_groups(weight.groups)
    zeros = None if weight.zeros is None else source.by_group(weight.zeros, all_groups=groups is not None)
    return UnpackedWeight(
        values=source.values(weight.values, device),
        scales=source.by_group(weight.scales, all_groups=groups is not None).to(device),
        zeros=None if zeros is None else zeros.to(device),
        groups=None if groups is None else groups.to(device),
    )


def input_groups(piece: Piece, scheme: WeightScheme, *, tensors: Mapping[str, Tensor], rank: Rank) -> Tensor | None:
    """`UnpackedWeight.groups` of the piece, without the rest."""
    part = None if piece.is_mxfp4 else stored_weight(scheme).groups
    return None if part is None else _Source(piece, scheme, tensors, *cuts(piece, rank)).shuffled_groups(part)


def _unpack_mxfp4(piece: Piece, *, tensors: Mapping[str, Tensor], rank: Rank, device: torch.device) -> UnpackedWeight:
    rows, columns = cuts(piece, rank)
    blocks, exponents = (
        torch.cat(
            [
                matrix[row, column.start // MXFP4_BLOCK : column.stop // MXFP4_BLOCK]
                for row in rows
                for column in columns
            ],
            dim=0 if len(rows) > 1 else 1,
        ).to(device)
        for matrix in (viewed(tensors[name], piece.view) for name in piece.tensors)
    )
    return UnpackedWeight(_unpack_inputs(blocks.flatten(1), bits=4), exponents, zeros=None, groups=None)


@dataclass(frozen=True, slots=True)
class _Source:
    """The tensors of one quantised weight, and which of its rows (outputs) and columns (inputs) are wanted."""

    piece: Piece
    scheme: WeightScheme
    tensors: Mapping[str, Tensor]
    rows: list[slice]
    columns: list[slice]

    def values(self, part: StoredPart, device: torch.device) -> Tensor:
        """[N, K], unpacked on the device."""
        words = self._stored(part)
        parts = [
            _numbers(words[tuple(self._entries(axis, row, column) for axis in part.axes)].to(device), part, self.scheme)
            for row in self.rows
            for column in self.columns
        ]
        # the last word of a row may have room for more
        num_columns = sum(column.stop - column.start for column in self.columns)
        return torch.cat(parts, dim=0 if len(self.rows) > 1 else 1)[:, :num_columns]

    def by_group(self, part: StoredPart, *, all_groups: bool) -> Tensor:
        """Scales or zero points [N, num_groups]: of the wanted columns or of all."""
        entire = self._stored(part)
        if self.scheme.layout == "gptq" and entire.dtype == torch.int32:
            entire = entire + _one_each(self.scheme.bits)
        numbers = _numbers(entire, part, self.scheme)[_group_rows(part, self.rows)]
        if all_groups:
            return numbers
        axis = part.axis("inputs")
        return torch.cat([numbers[:, self._entries(axis, self.rows[0], column)] for column in self.columns], dim=1)

    def shuffled_groups(self, part: StoredPart) -> Tensor | None:
        """The group of each wanted column; None where the groups follow one another."""
        module = module_of(self.piece)
        if part.name(module, self.tensors) not in self.tensors:
            return None
        groups = self._stored(part).to(torch.int64)
        group_size = self.scheme.block[1] or len(groups)
        in_order = torch.arange(len(groups)) // group_size
        if torch.equal(groups, in_order):
            return None
        if not torch.equal(groups.sort().values, in_order):
            raise UnsupportedModel(f"{module} has groups of inputs that are not all of {group_size}")
        return torch.cat([groups[column] for column in self.columns])

    def _stored(self, part: StoredPart) -> Tensor:
        tensor = self.tensors[part.name(module_of(self.piece), self.tensors)]
        # a scale for each row may be stored as [N] or [N, 1], one for all as [] or [1]
        return tensor.view(part.shape(self.piece.tensor_shape, self.scheme.bits))

    def _entries(self, axis: Axis, row: slice, column: slice) -> slice:
        num_outputs, num_inputs = self.piece.tensor_shape
        cut, size = (row, num_outputs) if axis.of == "outputs" else (column, num_inputs)
        return entries(axis, cut, size, bits=self.scheme.bits, tensor=module_of(self.piece))


def dequantize(weight: UnpackedWeight, scheme: WeightScheme, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`: bitwise what `llmd_kernels.dequantized` makes of the packed weight."""
    if scheme.layout == "mxfp4":
        return float4_numbers(weight.values, weight.scales, dtype)
    scales = _by_input(weight.scales, weight, scheme)
    if scheme.layout == "float8":
        return (weight.values.float() * scales.float()).to(dtype)
    zeros: Tensor | int = 2 ** (scheme.bits - 1)
    if weight.zeros is not None:
        zeros = _by_input(weight.zeros, weight, scheme).to(torch.int16)
    return (weight.values.to(torch.int16) - zeros).to(dtype) * scales.to(dtype)


def _by_input(numbers: Tensor, weight: UnpackedWeight, scheme: WeightScheme) -> Tensor:
    """[N, num_groups] → [N, K]."""
    if weight.groups is not None:
        return numbers[:, weight.groups]
    num_outputs, num_inputs = weight.values.shape
    group_size = scheme.block[1] or num_inputs
    # the last group may be cut off
    return numbers[:, :, None].expand(-1, -1, group_size).reshape(num_outputs, -1)[:, :num_inputs]


def _numbers(stored: Tensor, part: StoredPart, scheme: WeightScheme) -> Tensor:
    """A stored matrix, or whole words of it, as one unsigned number an entry, outputs first."""
    if stored.dtype == torch.int8:
        # −128 … 127 → 0 … 255, and the zero point with it
        stored = stored.view(torch.uint8) ^ 128
    matrix = stored if part.axes[0].of == "outputs" else stored.t().contiguous()
    if part.axis("outputs").packed:
        places = AWQ_PLACES if scheme.layout == "awq" else range(32 // scheme.bits)
        return _unpack_outputs(matrix, scheme.bits, places)
    if part.axis("inputs").packed:
        return _unpack_inputs(matrix, scheme.bits)
    return matrix


def _unpack_outputs(words: Tensor, bits: int, places: Iterable[int]) -> Tensor:
    """int32 [rows, columns] → uint8 [rows · 32 / bits, columns]. places: of a word's numbers, 0 = the lowest bits."""
    mask = 2**bits - 1
    return torch.stack([(words >> bits * place & mask).to(torch.uint8) for place in places], dim=1).flatten(0, 1)


def _unpack_inputs(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, columns] → uint8 [rows, columns · 32 / bits], the lowest bits first; of bytes a quarter of that."""
    # flat first: a single column may have any stride and still be contiguous
    numbers = words.reshape(-1).view(torch.uint8)
    if bits == 4:
        numbers = torch.stack((numbers & 15, numbers >> 4), dim=-1)
    return numbers.view(words.shape[0], -1)


def _group_rows(part: StoredPart, rows: list[slice]) -> Tensor:
    """Which row of scales or zero points each of the weight's rows has."""
    per = part.axis("outputs").per
    numbers = torch.cat([torch.arange(row.start, row.stop) for row in rows])
    return torch.zeros_like(numbers) if per is None else numbers // per


def _one_each(bits: int) -> int:
    """Each number one up. As a sum of whole words: that is how writers take the one off, and borrow between numbers."""
    return sum(1 << shift for shift in range(0, 32, bits))
