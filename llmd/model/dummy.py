"""Random weights for a model whose own are not here: the same sizes, so the same speed, and no sense. No files."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from llmd.model.parallel import Parameter, Rank

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
    generator = torch.Generator(device).manual_seed(_SEED)
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
