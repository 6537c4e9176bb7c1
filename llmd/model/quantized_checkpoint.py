"""What is particular to checkpoints with quantised weights: headers are checked, weights loaded or dequantised.

`checkpoint.py` asks this for the pieces that have a scheme. Knows no model.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from llmd.errors import UnsupportedModel
from llmd.model.parallel import Parameter, Piece, Rank
from llmd.model.quantization import QuantizationSpec, WeightScheme
from llmd.model.quantized_layouts import (
    UNREAD,
    StoredPart,
    kept_bytes,
    module_of,
    piece_scheme,
    stored_weight,
)
from llmd.model.quantized_packing import read_quantized
from llmd.model.quantized_weights import dequantize, unpack
from llmd.model.safetensors_folder import StoredTensor
from llmd_kernels import QuantizedWeight

ROWS_AT_ONCE = 128


def check_quantized(stored: Mapping[str, StoredTensor], piece: Piece, scheme: WeightScheme) -> set[str]:
    """The names of what the piece is read from. Raises UnsupportedModel for what is missing or unlike the scheme."""
    module, weight = module_of(piece), stored_weight(scheme)
    names: set[str] = set()
    group = scheme.block[1]
    if scheme.layout != "float8" and group is not None and piece.tensor_shape[1] % group:
        raise UnsupportedModel(f"{module} has {piece.tensor_shape[1]} inputs, which are no whole groups of {group}")
    for part in weight.parts():
        name = part.name(module, stored)
        if name in stored:
            _check_part(stored[name], name, part, part.shape(piece.tensor_shape, scheme.bits))
            names.add(name)
        elif part is not weight.groups or scheme.shuffled:
            raise UnsupportedModel(
                f"The checkpoint has no tensor {name}; quantization_config in config.json says that "
                f"{module} is quantised ({scheme.describe()})"
            )
    return names


def _check_part(tensor: StoredTensor, name: str, part: StoredPart, shape: tuple[int, ...]) -> None:
    # a scale for each row may be stored as [N] or [N, 1], one for all as [] or [1]
    if [size for size in tensor.shape if size != 1] != [size for size in shape if size != 1]:
        raise UnsupportedModel(
            f"The tensor {name} has the shape {list(tensor.shape)}; config.json implies {list(shape)}"
        )
    if tensor.dtype not in part.dtypes:
        raise UnsupportedModel(f"The tensor {name} has the dtype {tensor.dtype}; supported: {', '.join(part.dtypes)}")


def unread_tensors(
    stored: Mapping[str, StoredTensor], parameters: Iterable[Parameter], quantization: QuantizationSpec | None
) -> frozenset[str]:
    """What may lie beside quantised weights without being read."""
    if quantization is None:
        return frozenset()
    figures = {name for name in stored if name.rpartition(".")[2] in UNREAD}
    return frozenset(figures | _extra_biases(stored, parameters, quantization))


def check_extra_biases(
    tensors: Mapping[str, Tensor], parameters: Iterable[Parameter], quantization: QuantizationSpec | None
) -> None:
    """Old GPTQ checkpoints have a bias of zeros everywhere. Raises UnsupportedModel for one that is not zero."""
    for name in sorted(_extra_biases(tensors, parameters, quantization)):
        if tensors[name].any():
            raise UnsupportedModel(f"The checkpoint has a tensor {name} that this architecture does not use")


def _extra_biases(
    stored: Mapping[str, object], parameters: Iterable[Parameter], quantization: QuantizationSpec | None
) -> set[str]:
    parameters = list(parameters)
    pieces = [(parameter, piece) for parameter in parameters for piece in parameter.pieces]
    biases = {f"{module_of(piece)}.bias" for p, piece in pieces if piece_scheme(p, piece, quantization) is not None}
    return (biases & set(stored)) - {piece.tensor for _, piece in pieces}


def copy_dequantized(
    target: Tensor, piece: Piece, scheme: WeightScheme, *, tensors: Mapping[str, Tensor], rank: Rank
) -> None:
    """Dequantise this rank's part of a piece into the target."""
    weight = unpack(piece, scheme, tensors=tensors, rank=rank, device=target.device)
    num_rows = weight.values.shape[0]
    # some rows at a time, so that what is computed on the way takes little memory
    for first in range(0, num_rows, ROWS_AT_ONCE):
        rows = slice(first, min(first + ROWS_AT_ONCE, num_rows))
        target[rows] = dequantize(weight.part_of_rows(rows), scheme, target.dtype)


def load_quantized(
    kept: Iterable[tuple[Parameter, WeightScheme]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    rank: Rank,
    tensors: Mapping[str, Tensor],
    progress: Callable[[int, int], None],
    bytes_before: int,
) -> dict[str, QuantizedWeight]:
    """This rank's part of the parameters that stay quantised, by name. dtype: of the activations.

    `progress` hears (bytes in place, bytes in all), both with the `bytes_before`.
    """
    kept = list(kept)
    sizes = [kept_bytes(parameter, scheme, rank, dtype_bytes=dtype.itemsize) for parameter, scheme in kept]
    done, total = bytes_before, bytes_before + sum(sizes)
    weights: dict[str, QuantizedWeight] = {}
    for (parameter, scheme), size in zip(kept, sizes, strict=True):
        weights[parameter.name] = read_quantized(
            parameter, scheme, dtype=dtype, tensors=tensors, rank=rank, device=device
        )
        done += size
        progress(done, total)
    return weights
