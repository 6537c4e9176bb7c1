"""Unpacked weights in the layouts that the kernels read, row by row of tiles. Knows no file and no model.

A stack of experts is one weight with all experts' outputs. Unpacked it would be several times as large as it is, so
that what is unpacked at any time is a piece of it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llmd.errors import UnsupportedModel
from llmd.model.parallel import Parameter, Rank
from llmd.model.quantization import WeightScheme
from llmd.model.quantized_layouts import KERNEL_TILE, float8_block
from llmd.model.quantized_weights import UnpackedWeight, input_groups, unpack
from llmd_kernels import (
    Float4Weight,
    Float8Weight,
    IntWeight,
    QuantizedWeight,
    pack_float4_weight,
    pack_int_weight,
)


def read_quantized(
    parameter: Parameter,
    scheme: WeightScheme,
    *,
    dtype: torch.dtype,
    tensors: Mapping[str, Tensor],
    rank: Rank,
    device: torch.device,
) -> QuantizedWeight:
    """The parameter's pieces, one below the other, in the kernels' layout.

    dtype: of the activations, and so of the integers' scales.
    """
    order = _input_order(parameter, scheme, tensors=tensors, rank=rank)
    return packed(
        (unpack(piece, scheme, tensors=tensors, rank=rank, device=device) for piece in parameter.pieces),
        parameter,
        scheme,
        dtype=dtype,
        rank=rank,
        input_order=None if order is None else order.to(device),
    )


def packed(
    parts: Iterable[UnpackedWeight],
    parameter: Parameter,
    scheme: WeightScheme,
    *,
    dtype: torch.dtype,
    rank: Rank,
    input_order: Tensor | None = None,
) -> QuantizedWeight:
    """The rank's rows of the parameter, which the parts have in turn, on their device.

    dtype: of the integers' scales. input_order: see `IntWeight`. Each part is taken when the one before is packed.
    """
    if scheme.layout == "float8":
        return _packed_float8(parts, parameter.matrix_shape(rank), float8_block(parameter, scheme, rank))
    num_outputs, _ = parameter.matrix_shape(rank)
    tiles, scales, row = None, None, 0
    for part in _whole_tiles(parts):
        weight = _packed_part(part, scheme, dtype=dtype, input_order=input_order)
        if weight.num_outputs == num_outputs:
            return weight
        part_scales = _scales(weight)
        if tiles is None or scales is None:
            num_tiles = -(-num_outputs // KERNEL_TILE)
            tiles = weight.tiles.new_empty(num_tiles, *weight.tiles.shape[1:])
            scales = part_scales.new_empty(part_scales.shape[0], num_outputs, *part_scales.shape[2:])
        tiles[row // KERNEL_TILE :][: len(weight.tiles)] = weight.tiles
        scales[:, row : row + weight.num_outputs] = part_scales
        row += weight.num_outputs
    assert tiles is not None, "a weight has rows"
    assert scales is not None
    if isinstance(weight, IntWeight):
        return replace(weight, tiles=tiles, groups=scales, num_outputs=num_outputs)
    return replace(weight, tiles=tiles, exponents=scales, num_outputs=num_outputs)


def _whole_tiles(parts: Iterable[UnpackedWeight]) -> Iterator[UnpackedWeight]:
    """The same rows in parts that end where a tile does, but for the last one."""
    begun: UnpackedWeight | None = None
    for part in parts:
        rows = part if begun is None else begun.above(part)
        num_rows = len(rows.values)
        num_whole = num_rows - num_rows % KERNEL_TILE
        if num_whole:
            yield rows.part_of_rows(slice(0, num_whole))
        begun = rows.part_of_rows(slice(num_whole, num_rows)) if num_whole < num_rows else None
    if begun is not None:
        yield begun


def _packed_part(
    part: UnpackedWeight, scheme: WeightScheme, *, dtype: torch.dtype, input_order: Tensor | None
) -> IntWeight | Float4Weight:
    if scheme.layout == "mxfp4":
        return pack_float4_weight(part.values, part.scales)
    values = part.values if input_order is None else part.values[:, input_order]
    return pack_int_weight(values, part.scales.to(dtype), part.zeros, bits=scheme.bits, input_order=input_order)


def _scales(weight: IntWeight | Float4Weight) -> Tensor:
    """[num_groups, num_outputs, …]."""
    return weight.groups if isinstance(weight, IntWeight) else weight.exponents


def _packed_float8(parts: Iterable[UnpackedWeight], shape: tuple[int, int], block: tuple[int, int]) -> Float8Weight:
    values: Tensor | None = None
    scales: list[Tensor] = []
    row = 0
    for part in parts:
        if values is None:
            values = part.values.new_empty(shape)
        values[row : row + len(part.values)] = part.values
        scales.append(part.scales.float())
        row += len(part.values)
    assert values is not None, "a weight has rows"
    # a copy: its strides are those of its shape, also where there is but one scale
    joined = torch.cat(scales)[:: block[0]].clone(memory_format=torch.contiguous_format)
    return Float8Weight(values, joined, block)


def _input_order(
    parameter: Parameter, scheme: WeightScheme, *, tensors: Mapping[str, Tensor], rank: Rank
) -> Tensor | None:
    """The inputs sorted by their group. Raises UnsupportedModel where one order does not do for the whole parameter."""
    orders = [input_groups(piece, scheme, tensors=tensors, rank=rank) for piece in parameter.pieces]
    groups = orders[0]
    if any((other is None) != (groups is None) for other in orders) or any(
        other is not None and groups is not None and not torch.equal(other, groups) for other in orders
    ):
        raise UnsupportedModel(f"{parameter.name}: its parts have their inputs in different groups (`desc_act`)")
    if groups is None:
        return None
    if parameter.num_experts is not None:
        raise UnsupportedModel(
            f"{parameter.name}: its inputs are in shuffled groups, not as `desc_act` in config.json has it"
        )
    if len(groups) != parameter.pieces[0].matrix_shape[1]:
        raise UnsupportedModel(f"{parameter.name}: shuffled groups (`desc_act`) cannot be split over ranks")
    return groups.argsort(stable=True)
