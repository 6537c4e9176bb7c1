"""Rotary embedding settings of a GGUF file as `config.json` has them."""

import math
from typing import Any

import numpy as np
from gguf import RopeScalingType
from gguf.quants import dequantize
from numpy.typing import NDArray

from llmd.errors import UnsupportedModel
from llmd.fetch.gguf.file import GgufFile

_FREQS = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = frozenset({_FREQS, _LONG, _SHORT})  # they hold settings, not weights
_DEFAULT_BASE = 10000.0
# what every model with Llama 3's scaling has had so far; GGUF keeps only the factors that come of it
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# keys of GGUF's yarn that transformers has no counterpart for, and the values at which they do nothing
_YARN_NEUTRAL = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}


def rope_config(file: GgufFile, rotary_dim: int) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`. Raises UnsupportedModel for a scaling that has no exact counterpart.

    `rotary_dim`: elements of a head that are rotated.
    """
    theta = file.setting("rope.freq_base", _DEFAULT_BASE)
    return {"rope_theta": theta, "rope_scaling": _scaling(file, theta, rotary_dim)}


def _scaling(file: GgufFile, theta: float, rotary_dim: int) -> dict[str, Any] | None:
    if _LONG in file.tensors:
        return _longrope(file)
    llama3 = _llama3(file, theta, rotary_dim) if _FREQS in file.tensors else None
    # files from before there was a scaling type
    legacy_factor = file.setting("rope.scale_linear", 1.0)
    default_kind = RopeScalingType.NONE if legacy_factor == 1.0 else RopeScalingType.LINEAR
    kind = file.setting("rope.scaling.type", default_kind.value)
    factor = file.setting("rope.scaling.factor", legacy_factor)
    if kind == RopeScalingType.NONE.value:
        return llama3
    if llama3 is not None:
        raise UnsupportedModel(f"{file.path}: two rope scalings at once ({kind} and {_FREQS}) are not supported.")
    if kind == RopeScalingType.LINEAR.value:
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    if kind == RopeScalingType.YARN.value:
        return _yarn(file, factor)
    raise UnsupportedModel(f"{file.path}: the rope scaling {kind!r} is not supported.")


def _yarn(file: GgufFile, factor: float) -> dict[str, Any]:
    for key, neutral in _YARN_NEUTRAL.items():
        if file.setting(f"rope.scaling.{key}", neutral) != neutral:
            raise UnsupportedModel(f"{file.path}: yarn rope scaling with its own {key} is not supported.")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": file.required_setting("rope.scaling.original_context_length"),
    }
    for key in ("beta_fast", "beta_slow"):
        value = file.setting(f"rope.scaling.yarn_{key}")
        if value is not None:
            scaling[key] = value
    return scaling


def _longrope(file: GgufFile) -> dict[str, Any]:
    context = file.required_setting("context_length")
    original = file.required_setting("rope.scaling.original_context_length")
    ratio = context / original
    implied = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    if not math.isclose(file.setting("rope.scaling.attn_factor", implied), implied, rel_tol=1e-4):
        raise UnsupportedModel(f"{file.path}: longrope scaling with an attention factor of its own is not supported.")
    return {"rope_type": "longrope", "short_factor": _values(file, _SHORT), "long_factor": _values(file, _LONG)}


def _llama3(file: GgufFile, theta: float, rotary_dim: int) -> dict[str, Any] | None:
    factors = np.array(_values(file, _FREQS))
    if np.all(factors == 1.0):
        return None
    # the lowest frequencies are divided by the whole factor
    factor = float(factors[-1])
    scaling = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    if len(factors) != rotary_dim // 2 or not np.allclose(
        factors, _llama3_factors(theta, rotary_dim, factor), rtol=1e-4
    ):
        raise UnsupportedModel(
            f"{file.path}: the rope frequencies in tensor {_FREQS} are not those of Llama 3's scaling."
        )
    return scaling


def _llama3_factors(theta: float, rotary_dim: int, factor: float) -> NDArray[np.float64]:
    """What each frequency is divided by (Llama 3.1; `transformers` calls it rope type "llama3"). [rotary_dim / 2]."""
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    wavelengths = 2 * math.pi * theta ** (np.arange(0, rotary_dim, 2) / rotary_dim)
    turns = _LLAMA3["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def _values(file: GgufFile, name: str) -> list[float]:
    if name not in file.tensors:
        raise UnsupportedModel(f"{file.path}: tensor {name} is missing.")
    tensor = file.tensors[name]
    # the shortest decimals, as in the metadata
    return [float(str(value)) for value in dequantize(tensor.rows, tensor.type).ravel()]
