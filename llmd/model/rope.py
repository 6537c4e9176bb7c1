"""Tables of cosines and sines for the rotary embeddings of `rope_spec.py`. Knows no layer and no sequence.

Every rule that depends on the length uses the length that is *served* (`max_model_len`), not that of the sequence at
hand: otherwise a cached key would have to turn when its sequence grows, and a token's numbers would depend on who
asked first (contracts C1 and C3). So LongRoPE takes its long factors where more than the trained length is served,
for short sequences too, and dynamic NTK fixes its base once. Serve no more than the trained length to have the
original model on short texts.
"""

import math

import torch
from torch import Tensor

from llmd.model.rope_spec import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeSpec,
    YarnScaling,
)


def cos_sin_table(rope: RopeSpec, *, max_model_len: int, device: torch.device) -> Tensor:
    """[max_model_len, rotary_dim] float32: rotary_dim/2 cosines, then as many sines, of each position.

    Angles are float32 products, as in transformers, so that the last bits agree.
    """
    frequencies = inverse_frequencies(rope, max_model_len=max_model_len)
    angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * frequencies[None, :]
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling | LongRopeScaling) else 1.0
    return (table * factor).to(device)


def inverse_frequencies(rope: RopeSpec, *, max_model_len: int) -> Tensor:
    """[rotary_dim / 2] float32, radians a position."""
    match rope.scaling:
        case None:
            return 1.0 / _periods(rope.theta, rope.rotary_dim)
        case LinearScaling(factor):
            return 1.0 / _periods(rope.theta, rope.rotary_dim) / factor
        case DynamicNtkScaling(factor, trained):
            stretch = factor * max(max_model_len, trained) / trained - (factor - 1)
            theta = rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
            return 1.0 / _periods(theta, rope.rotary_dim)
        case Llama3Scaling():
            return _llama3(1.0 / _periods(rope.theta, rope.rotary_dim), rope.scaling)
        case YarnScaling():
            return _yarn(rope, rope.scaling)
        case LongRopeScaling(short_factors, long_factors, trained):
            factors = long_factors if max_model_len > trained else short_factors
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * _periods(rope.theta, rope.rotary_dim))


def _periods(theta: float, rotary_dim: int) -> Tensor:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return torch.pow(theta, exponents)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    smooth = (scaling.trained_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    # between the two borders a mixture; at and beyond them exactly one of both
    mixed = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    longest = scaling.trained_positions / scaling.low_freq_factor
    shortest = scaling.trained_positions / scaling.high_freq_factor
    scaled = torch.where(wavelengths > longest, frequencies / scaling.factor, mixed)
    return torch.where(wavelengths < shortest, frequencies, scaled)


def _yarn(rope: RopeSpec, scaling: YarnScaling) -> Tensor:
    periods = _periods(rope.theta, rope.rotary_dim)
    low = _dimension_of_rotations(rope, scaling.beta_fast, scaling.trained_positions)
    high = _dimension_of_rotations(rope, scaling.beta_slow, scaling.trained_positions)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    # the rounded complement twice, as in transformers: the frequencies then agree to the last bit
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _dimension_of_rotations(rope: RopeSpec, num_rotations: float, num_positions: int) -> float:
    """Where in the spectrum a pair turns that many times within so many positions."""
    return (rope.rotary_dim * math.log(num_positions / (num_rotations * 2 * math.pi))) / (2 * math.log(rope.theta))
