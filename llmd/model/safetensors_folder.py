"""A folder of safetensors files: which tensors there are, and their bytes without reading them. Never pickle.

Format: 8 bytes little-endian length, so many bytes of JSON, then the tensors' bytes
(https://github.com/huggingface/safetensors). Knows nothing of models.
"""

import json
import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmd.errors import UnsupportedModel

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# what is read; quantised weights consist of the others
DTYPES = FLOAT_DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's bytes are."""

    file: Path
    dtype: str  # as the format calls it: "F32", "BF16", …
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


def read_headers(
    folder: Path, *, prefixes: Iterable[tuple[str, str]] = (), ignored_prefixes: tuple[str, ...] = ()
) -> dict[str, StoredTensor]:
    """All tensors of a folder with one safetensors file or an index of several, by name.

    prefixes: beginnings of names, as found → as they shall be called. Tensors whose name begins with one of
    `ignored_prefixes` are left out. Raises UnsupportedModel, naming the file, for one that is missing or damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _files(folder):
        for name, tensor in _read_header(file).items():
            if name.startswith(ignored_prefixes):
                continue
            found, called = next((pair for pair in prefixes if name.startswith(pair[0])), ("", ""))
            tensors[called + name.removeprefix(found)] = tensor
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.exists():
        weight_map = _parse_json(index, index.read_bytes()).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UnsupportedModel(f"{index} has no weight_map")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        # a file name with a folder in it would read outside the model
        if any(file.parent != folder for file in files):
            raise UnsupportedModel(f"{index} names files outside of the model's folder")
    else:
        files = [folder / SINGLE_FILE]
    for file in files:
        if not file.is_file():
            raise UnsupportedModel(f"There is no file {file}: llmd needs a model in the safetensors format")
    return files


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise UnsupportedModel(f"{file} is damaged: its header is longer than the file or the format allows")
        header = _parse_json(file, stream.read(length))
    header.pop("__metadata__", None)
    return {name: _stored_tensor(file, name, entry, 8 + length, size) for name, entry in header.items()}


def _stored_tensor(file: Path, name: str, entry: Any, data_start: int, file_size: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        # only the dtypes that are read can be checked against their extent; others are refused by name later
        extent = prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
        whole_numbers = all(type(number) is int for number in (*shape, begin, end))
        sound = whole_numbers and 0 <= begin <= end and end - begin == extent
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"{file} is damaged: its header describes the tensor {name} wrongly") from error
    if not sound:
        raise UnsupportedModel(f"{file} is damaged: the tensor {name} does not have the size that its shape implies")
    if data_start + end > file_size:
        raise UnsupportedModel(f"{file} is damaged: it ends before the end of the tensor {name}. Download it again")
    return StoredTensor(file=file, dtype=dtype, shape=shape, offset=data_start + begin)


def _parse_json(file: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UnsupportedModel(f"{file} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{file} is damaged: it holds no JSON object")
    return value


def open_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Those tensors that have a known dtype, in their files: only what is used of them is read."""
    files = {file: map_file(file) for file in {tensor.file for tensor in stored.values()}}
    known = {name: tensor for name, tensor in stored.items() if tensor.dtype in DTYPES}
    return {name: tensor_view(files[tensor.file], tensor) for name, tensor in known.items()}


def map_file(file: Path) -> mmap.mmap:
    with file.open("rb") as stream:
        # copy-on-write, because torch takes only buffers that it may write to; nothing is ever written
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped.madvise(mmap.MADV_WILLNEED)
    return mapped


def tensor_view(mapped: mmap.mmap, tensor: StoredTensor) -> Tensor:
    flat = torch.frombuffer(mapped, dtype=DTYPES[tensor.dtype], count=prod(tensor.shape), offset=tensor.offset)
    return flat.view(tensor.shape)
