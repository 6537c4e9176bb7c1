"""The truth of `linear_draw`: products, logits, noise, the best, one after another, in the dtype of x."""

import torch
from torch import Tensor

from llmd_kernels.linear import reference as linear_reference
from llmd_kernels.sample import reference as sample_reference
from llmd_kernels.scale_logits import reference as scale_reference


def linear_draw(
    x: Tensor,
    weight: Tensor,
    temperatures: Tensor,
    *,
    seeds: Tensor,
    choices: Tensor,
    positions: Tensor,
    divisor: float = 1.0,
    soft_cap: float | None = None,
) -> Tensor:
    """The largest logit + temperature · noise, of equal ones the lowest id."""
    logits = scale_reference.scale_logits(linear_reference.linear(x, weight), divisor=divisor, soft_cap=soft_cap)
    token_ids = []
    keys = zip(temperatures.tolist(), seeds.tolist(), positions.tolist(), choices.tolist(), strict=True)
    for row, (temperature, seed, position, choice) in zip(logits.tolist(), keys, strict=True):
        noisy = [
            logit + temperature * sample_reference.gumbel(seed % 2**64, position, choice % 2**32, i)
            for i, logit in enumerate(row)
        ]
        token_ids.append(max(range(len(noisy)), key=lambda i: (noisy[i], -i)))
    return torch.tensor(token_ids, dtype=torch.int64, device=x.device)
