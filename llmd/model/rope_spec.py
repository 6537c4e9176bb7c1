"""Which rotary embedding a model uses, read from any convention of config.json. No tensors: tables are `rope.py`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmd.errors import UnsupportedModel
from llmd.model.config_fields import ConfigFields

LayerType = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicNtkScaling:
    """The base grows with the length that is served, once that is longer than the length of the training."""

    factor: float
    trained_positions: int


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, those between interpolated (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    trained_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Interpolation by parts of the spectrum, with a temperature (Peng et al., arXiv 2309.00071)."""

    factor: float
    trained_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool  # the borders of the ramp to whole dimensions
    attention_factor: float  # of cosines and sines
    score_factor: float  # of the scores, in families with latent attention


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """A divisor for each frequency: one list up to the length of the training, one beyond (arXiv 2402.13753)."""

    short_factors: tuple[float, ...]  # [rotary_dim / 2]
    long_factors: tuple[float, ...]  # [rotary_dim / 2]
    trained_positions: int
    attention_factor: float  # of cosines and sines


RopeScaling = LinearScaling | DynamicNtkScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, slots=True)
class RopeSpec:
    theta: float
    rotary_dim: int  # leading entries of a head that rotate
    scaling: RopeScaling | None = None


COMMON_KEYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
# What each type may say. An original length beside `linear` or `dynamic`, and `finetuned`, have no effect.
SCALING_KEYS: dict[str, set[str]] = {
    "default": {"original_max_position_embeddings"},
    "linear": {"factor", "original_max_position_embeddings"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate", "finetuned",
    },
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
}  # fmt: skip


def parse_rope(
    fields: ConfigFields, layer_type: LayerType, *, head_dim: int, max_positions: int, partial_rotary: bool
) -> RopeSpec:
    """The rotary embedding of the layers of one type.

    Reads transformers 5's `rope_parameters` (flat, or one dict for each layer type) and transformers 4's `rope_theta`
    with `rope_scaling`. `rope_local_base_freq` (Gemma 3) is the theta of sliding layers, which are never scaled.
    """
    parameters = _parameters_of(fields, layer_type)
    kind = _kind(fields, parameters)
    unknown = {key for key, value in parameters.items() if value is not None} - COMMON_KEYS - SCALING_KEYS[kind]
    if unknown:
        raise fields.unsupported(f"`{min(unknown)}` is not supported with the rope type {kind!r}")
    reader = ConfigFields(fields.architecture, {k: v for k, v in parameters.items() if v is not None}, {})
    theta = reader.number("rope_theta")
    partial = reader.optional_number("partial_rotary_factor") or 1.0
    if partial != 1 and not partial_rotary:
        raise fields.unsupported(f"`partial_rotary_factor` ({partial:g}) is not supported with this architecture")
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise fields.unsupported(
            f"the rotary embedding covers {rotary_dim} entries of a head; it must be an even number"
        )
    scaling = _scaling(kind, reader, rotary_dim=rotary_dim, max_positions=max_positions)
    return RopeSpec(theta=theta, rotary_dim=rotary_dim, scaling=scaling)


def _parameters_of(fields: ConfigFields, layer_type: LayerType) -> dict[str, Any]:
    """`rope_parameters` of one layer type as transformers 5 would write them, whatever convention the file has."""
    old, new = fields.value("rope_scaling"), fields.value("rope_parameters")
    theta = fields.optional_number("rope_theta")
    partial = fields.optional_number("partial_rotary_factor")
    scaling = old if old is not None else new
    if scaling is not None and not isinstance(scaling, Mapping):
        raise fields.unsupported(f"`rope_scaling` in config.json must be an object, not {scaling!r}")
    scaling = dict(scaling or {})
    local_theta = fields.optional_number("rope_local_base_freq")
    if {"full_attention", "sliding_attention"} & scaling.keys():
        scaling = dict(scaling.get(layer_type) or {})
        if layer_type == "sliding_attention" and local_theta is not None:
            theta = local_theta
    elif layer_type == "sliding_attention" and local_theta is not None:
        scaling, theta = {}, local_theta
    scaling.setdefault("rope_theta", theta)
    scaling.setdefault("partial_rotary_factor", partial)
    # Phi-3 keeps it outside the rope's own dict, and there it counts
    trained = fields.optional_integer("original_max_position_embeddings")
    if trained is not None:
        scaling["original_max_position_embeddings"] = trained
    return scaling


def _kind(fields: ConfigFields, parameters: Mapping[str, Any]) -> str:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    # Phi-3's first checkpoints call longrope by other names
    if kind == "su" or (kind == "yarn" and "long_factor" in parameters):
        return "longrope"
    if kind not in SCALING_KEYS:
        raise fields.unsupported(f"the rope type {kind!r} is not supported")
    return str(kind)


def _scaling(kind: str, reader: ConfigFields, *, rotary_dim: int, max_positions: int) -> RopeScaling | None:
    trained = reader.optional_integer("original_max_position_embeddings") or max_positions
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(reader.number("factor"))
        case "dynamic":
            # transformers starts from max_position_embeddings, whatever the original length is said to be
            return DynamicNtkScaling(reader.number("factor"), max_positions)
        case "llama3":
            return Llama3Scaling(
                factor=reader.number("factor"),
                low_freq_factor=reader.number("low_freq_factor"),
                high_freq_factor=reader.number("high_freq_factor"),
                trained_positions=trained,
            )
        case "yarn":
            return _yarn(reader, trained=trained, max_positions=max_positions)
        case _:
            return _longrope(reader, rotary_dim=rotary_dim, trained=trained, max_positions=max_positions)


def _yarn(reader: ConfigFields, *, trained: int, max_positions: int) -> YarnScaling:
    factor = reader.optional_number("factor") or max_positions / trained
    mscale, mscale_all_dim = reader.optional_number("mscale"), reader.optional_number("mscale_all_dim")
    attention_factor = reader.optional_number("attention_factor")
    if attention_factor is None:
        attention_factor = _yarn_mscale(factor, 1.0)
        if mscale and mscale_all_dim:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    return YarnScaling(
        factor=factor,
        trained_positions=trained,
        beta_fast=reader.optional_number("beta_fast") or 32.0,
        beta_slow=reader.optional_number("beta_slow") or 1.0,
        truncate=reader.value("truncate") in (None, True),
        attention_factor=attention_factor,
        score_factor=_yarn_mscale(factor, mscale_all_dim) ** 2 if mscale_all_dim else 1.0,
    )


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(reader: ConfigFields, *, rotary_dim: int, trained: int, max_positions: int) -> LongRopeScaling:
    factor = reader.optional_number("factor") or max_positions / trained
    attention_factor = reader.optional_number("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return LongRopeScaling(
        short_factors=_factors(reader, "short_factor", rotary_dim // 2),
        long_factors=_factors(reader, "long_factor", rotary_dim // 2),
        trained_positions=trained,
        attention_factor=attention_factor,
    )


def _factors(reader: ConfigFields, name: str, count: int) -> tuple[float, ...]:
    factors = reader.value(name)
    if not isinstance(factors, list) or len(factors) != count or not all(isinstance(f, int | float) for f in factors):
        raise UnsupportedModel(f"{reader.architecture}: `{name}` of longrope must be a list of {count} numbers")
    return tuple(float(factor) for factor in factors)
