"""Random weights for a model whose own are not here: the same sizes, so the same speed, and no sense. No files."""

from collections.abc import Callable, Iterable, Iterator
from math import floor, log2

import torch
from torch import Tensor

from llmd.model.parallel import Parameter, Rank
from llmd.model.quantization import WeightScheme
from llmd.model.quantized_layouts import KERNEL_TILE
from llmd.model.quantized_packing import packed
from llmd.model.quantized_weights import UnpackedWeight
from llmd_kernels import QuantizedWeight
from llmd_kernels.quantized_linear.weights import FLOAT4_BIAS, FLOAT4_MAGNITUDES

_SEED = 0
_BIAS_DEVIATION = 0.02
# of quantised weights, so that what is computed on the way takes little memory
_ROWS_AT_ONCE = 64 * KERNEL_TILE


def dummy_parameters(
    parameters: Iterable[Parameter],
    *,
    norm_weight_offset: float,
    dtype: torch.dtype,
    device: torch.device,
    rank: Rank,
    progress: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """This rank's part of each parameter, by name, made where it will live; the same at every start on one device.

    Matrices keep the size of what they multiply, norms change nothing, so that numbers stay finite through any number
    of layers. `progress`: as in `load_parameters`.
    """
    parameters = list(parameters)
    total = sum(parameter.num_bytes(rank, dtype.itemsize) for parameter in parameters)
    generator = _generator(device)
    done = 0
    progress(done, total)
    weights: dict[str, Tensor] = {}
    for parameter in parameters:
        kept_dtype = torch.float32 if parameter.in_float32 else dtype
        weight = torch.empty(parameter.shape(rank), dtype=kept_dtype, device=device)
        if parameter.name.endswith("norm"):
            weight.fill_(1 - norm_weight_offset)
        else:
            deviation = weight.shape[-1] ** -0.5 if weight.dim() > 1 else _BIAS_DEVIATION
            # even numbers between two bounds take a fraction of the time of normal ones
            weight.uniform_(-(3**0.5) * deviation, 3**0.5 * deviation, generator=generator)
        weights[parameter.name] = weight
        done += weight.nbytes
        progress(done, total)
    return weights


def _generator(device: torch.device) -> torch.Generator | None:
    """None for tensors without memory, which have no numbers."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(_SEED)


def dummy_quantized(
    kept: Iterable[tuple[Parameter, WeightScheme]], *, dtype: torch.dtype, device: torch.device, rank: Rank
) -> dict[str, QuantizedWeight]:
    """The same of what stays quantised; every integer, code and float8 between the bounds is as likely as another."""
    generator = _generator(device)
    weights: dict[str, QuantizedWeight] = {}
    for parameter, scheme in kept:
        shape = parameter.matrix_shape(rank)
        parts = _random_parts(shape, scheme, device=device, generator=generator)
        order = torch.randperm(shape[1], generator=generator, device=device) if scheme.shuffled else None
        weights[parameter.name] = packed(parts, parameter, scheme, dtype=dtype, rank=rank, input_order=order)
    return weights


def _random_parts(
    shape: tuple[int, int], scheme: WeightScheme, *, device: torch.device, generator: torch.Generator | None
) -> Iterator[UnpackedWeight]:
    """Some rows at a time."""
    num_outputs, num_inputs = shape
    # those without memory all at once: they cost the same
    rows_at_once = num_outputs if device.type == "meta" else _ROWS_AT_ONCE
    group = scheme.block[1] or num_inputs
    # the last one of float8 may be cut off
    num_groups = -(-num_inputs // group) if scheme.layout == "float8" else num_inputs // group
    deviation = num_inputs**-0.5
    for first in range(0, num_outputs, rows_at_once):
        num_rows = min(rows_at_once, num_outputs - first)
        if scheme.layout == "float8":
            numbers = torch.empty(num_rows, num_inputs, device=device).uniform_(-1, 1, generator=generator)
            values, scale = numbers.to(torch.float8_e4m3fn), 3**0.5 * deviation
        else:
            values = torch.empty(num_rows, num_inputs, dtype=torch.uint8, device=device)
            values.random_(2**scheme.bits, generator=generator)
            scale = 12**0.5 / 2**scheme.bits * deviation
        if scheme.layout == "mxfp4":
            scales = _random_exponents((num_rows, num_groups), deviation, device=device, generator=generator)
        else:
            scales = torch.full((num_rows, num_groups), scale, device=device)
        yield UnpackedWeight(values, scales, zeros=None, groups=None)


def _random_exponents(
    shape: tuple[int, int], deviation: float, *, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """uint8. Of two powers of two, so often the one and the other that MXFP4's numbers have the deviation."""
    wanted = deviation**2 / (sum(magnitude**2 for magnitude in FLOAT4_MAGNITUDES) / len(FLOAT4_MAGNITUDES))
    exponent = floor(log2(wanted) / 2)
    share_of_greater = (wanted / 4**exponent - 1) / 3
    greater = torch.empty(shape, device=device).bernoulli_(share_of_greater, generator=generator)
    return (greater + (FLOAT4_BIAS + exponent)).to(torch.uint8)
