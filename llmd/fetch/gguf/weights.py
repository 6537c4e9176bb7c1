"""Tensors of a GGUF file to one safetensors file, a few megabytes in memory at a time.

Each tensor keeps the precision it has: F32 stays float32, F16 stays float16, BF16 and everything quantised become
bfloat16 (a bfloat16 rounds by 2^-9 at most, an 8-bit quantisation has already lost more than that).
Format: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from llmd.errors import UnsupportedModel
from llmd.fetch.gguf.file import GgufTensor
from llmd.fetch.progress import Progress

_CHUNK_ELEMENTS = 1 << 21  # 8 MiB as float32
_SAFETENSORS_TYPES = {GGMLQuantizationType.F32: "F32", GGMLQuantizationType.F16: "F16"}  # all else: BF16
_ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}  # bytes


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the safetensors file, and how it comes from the GGUF file."""

    name: str
    source: GgufTensor
    row_order: NDArray[np.intp] | None = None  # [rows]: the source row of each row; None = as they are
    offset: float = 0.0  # added to every element

    @property
    def dtype(self) -> str:
        """safetensors' name of the element type."""
        return _SAFETENSORS_TYPES.get(self.source.type, "BF16")

    @property
    def num_bytes(self) -> int:
        """Size in the safetensors file."""
        return math.prod(self.source.shape) * _ITEM_SIZES[self.dtype]


def check_types(tensors: list[PlannedTensor]) -> None:
    """Raise UnsupportedModel, naming the tensor, unless the `gguf` package can dequantise all of them."""
    known = set()
    for tensor in tensors:
        source = tensor.source
        if source.type in known:
            continue
        try:
            dequantize(source.rows.reshape(-1, source.rows.shape[-1])[:1], source.type)
        except (NotImplementedError, ValueError) as error:
            raise UnsupportedModel(
                f"Tensor {source.name} is of type {source.type.name}, which cannot be read here. Take another "
                "quantisation of the model (e.g. Q8_0)."
            ) from error
        known.add(source.type)


def write_safetensors(path: Path, tensors: list[PlannedTensor], progress: Progress) -> None:
    """Write `tensors` to `path`, in this order."""
    total = sum(tensor.num_bytes for tensor in tensors)
    written = 0
    with path.open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            for chunk in _chunks(tensor):
                written += file.write(chunk.data)
                progress("converting the weights", written / total)


def _header(tensors: list[PlannedTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.source.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the data is aligned
    return struct.pack("<Q", len(header)) + header


def _chunks(tensor: PlannedTensor) -> Iterator[NDArray[Any]]:
    rows = tensor.source.rows.reshape(-1, tensor.source.rows.shape[-1])
    num_rows = len(rows)
    elements_a_row = math.prod(tensor.source.shape) // num_rows
    step = max(1, _CHUNK_ELEMENTS // elements_a_row)
    for start in range(0, num_rows, step):
        window = slice(start, start + step)
        taken = rows[window] if tensor.row_order is None else rows[tensor.row_order[window]]
        values = dequantize(taken, tensor.source.type)
        if tensor.offset:
            values = values + np.float32(tensor.offset)
        yield _encode(values, tensor.dtype)


def _encode(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    if dtype == "F32":
        return np.ascontiguousarray(values)
    if dtype == "F16":
        return values.astype(np.float16)
    return to_bfloat16(values)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of `values` as bfloat16, rounded to nearest, ties to even. NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    result = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        result[nan] = 0x7FC0
    return result
