"""Random weights for a model whose own are not here: the same sizes, so the same speed, and no sense. No files."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from llmd.model.parallel import Parameter, Rank
from llmd.model.quantization import WeightScheme
from llmd.model.quantized_layouts import float8_block
from llmd_kernels import Float8Weight, QuantizedWeight, pack_int_weight

_SEED = 0
_BIAS_DEVIATION = 0.02


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
    """The same of what stays quantised; every integer and float8 between the bounds is as likely as another."""
    generator = _generator(device)
    weights: dict[str, QuantizedWeight] = {}
    for parameter, scheme in kept:
        num_outputs, num_inputs = parameter.shape(rank)
        deviation = num_inputs**-0.5
        if scheme.layout == "float8":
            block = float8_block(parameter, scheme, rank)
            values = torch.empty(num_outputs, num_inputs, device=device).uniform_(-1, 1, generator=generator)
            num_scales = [-(-size // step) for size, step in zip((num_outputs, num_inputs), block, strict=True)]
            scales = torch.full(num_scales, 3**0.5 * deviation, device=device)
            weights[parameter.name] = Float8Weight(values.to(torch.float8_e4m3fn), scales, block)
            continue
        integers = torch.empty(num_outputs, num_inputs, dtype=torch.uint8, device=device)
        integers.random_(2**scheme.bits, generator=generator)
        num_groups = num_inputs // (scheme.block[1] or num_inputs)
        scale = 12**0.5 / 2**scheme.bits * deviation
        scales = torch.full((num_outputs, num_groups), scale, dtype=dtype, device=device)
        order = torch.randperm(num_inputs, generator=generator, device=device) if scheme.shuffled else None
        weights[parameter.name] = pack_int_weight(integers, scales, None, bits=scheme.bits, input_order=order)
    return weights
