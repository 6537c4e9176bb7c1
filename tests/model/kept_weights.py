"""The weights of a model folder as a device with kernels for quantised ones has them, and as one without."""

from pathlib import Path

import torch
from torch import Tensor

from llmd.model.checkpoint import load_parameters
from llmd.model.parallel import Rank
from llmd.model.parameters import parameters
from llmd.model.quantized_checkpoint import load_quantized
from llmd.model.quantized_layouts import kept_parameters
from llmd.model.safetensors_folder import open_tensors, read_headers
from llmd.model.spec import load_spec
from llmd_kernels import Float4Weight, Float8Weight, QuantizedWeight

CPU = torch.device("cpu")
ONE_RANK = Rank()


def load_dequantized(folder: Path, dtype: torch.dtype, rank: Rank = ONE_RANK) -> dict[str, Tensor]:
    """As on a device without kernels."""
    spec = load_spec(folder)
    return load_parameters(
        read_headers(folder), parameters(spec), dtype=dtype, device=CPU, rank=rank,
        progress=lambda _done, _total: None, quantization=spec.quantization,
    )  # fmt: skip


def load_kept(
    folder: Path, dtype: torch.dtype, rank: Rank = ONE_RANK
) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    """As on a device with kernels: what stays plain, and what stays quantised."""
    spec, stored = load_spec(folder), read_headers(folder)
    kept = kept_parameters(parameters(spec), spec.quantization)
    quantized = load_quantized(
        kept.values(),
        dtype=dtype,
        device=CPU,
        rank=rank,
        tensors=open_tensors(stored),
        progress=lambda _done, _total: None,
        bytes_before=0,
    )
    plain = [parameter for parameter in parameters(spec) if parameter.name not in kept]
    weights = load_parameters(
        stored, plain, dtype=dtype, device=CPU, rank=rank, progress=lambda _done, _total: None,
        quantization=spec.quantization,
    )  # fmt: skip
    return weights, quantized


def num_bytes(weights: dict[str, Tensor], quantized: dict[str, QuantizedWeight]) -> int:
    """What they take together."""
    return sum(weight.nbytes for weight in weights.values()) + sum(map(nbytes, quantized.values()))


def nbytes(weight: QuantizedWeight) -> int:
    if isinstance(weight, Float8Weight):
        return weight.values.nbytes + weight.scales.nbytes
    if isinstance(weight, Float4Weight):
        return weight.tiles.nbytes + weight.exponents.nbytes
    order_bytes = 0 if weight.input_order is None else weight.input_order.nbytes
    return weight.tiles.nbytes + weight.groups.nbytes + order_bytes
