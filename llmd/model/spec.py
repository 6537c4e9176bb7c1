"""What a model is, as numbers: `ModelSpec` from config.json. No tensors, no family by name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmd.errors import UnsupportedModel
from llmd.model.config_fields import ConfigFields
from llmd.model.family import Family, Presence
from llmd.model.moe_spec import MoeSpec, parse_moe
from llmd.model.quantization import QuantizationSpec
from llmd.model.quantization_config import parse_quantization
from llmd.model.registry import FAMILIES
from llmd.model.rope_spec import DynamicNtkScaling, LayerType, RopeSpec, YarnScaling, parse_rope

Activation = Literal["silu", "gelu_tanh", "gelu"]
StoredDtype = Literal["float32", "bfloat16", "float16"]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
DTYPES: tuple[StoredDtype, ...] = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer."""

    window: int | None  # a token sees itself and window - 1 tokens before it; None = everything before it
    rope: RopeSpec | None  # None = no positions at all (NoPE)
    moe: MoeSpec | None = None  # None = one MLP for all tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Multi-head latent attention (MLA; DeepSeek-AI, arXiv 2405.04434): keys and values come from a short latent."""

    q_rank: int | None  # queries come from a latent of this size; None = from the hidden state
    kv_rank: int
    rope_dim: int  # entries of a query or key that rotate; the key's are those of all heads
    nope_dim: int  # entries that do not
    v_dim: int  # of a head's value


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model. Two models with equal specs compute the same from equal weights."""

    architecture: str  # a key of `registry.FAMILIES`
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    max_positions: int  # the context that the model is made for
    max_stretched_positions: int  # the context that it may be stretched to at a price (dynamic NTK), ≥ max_positions
    norm_eps: float
    norm_weight_offset: float  # added to each norm's weights
    pre_norm: bool  # norms before attention and MLP
    post_norm: bool  # norms after attention and MLP, before the residual addition
    qk_norm: Literal["none", "head", "projection"]  # RMS norm of queries and keys: none, by head, over all heads
    qkv_bias: bool
    o_bias: bool
    sinks: bool  # one more score a head, without a value
    rope_interleaved: bool  # the pairs (2i, 2i + 1) turn; otherwise (i, rotary_dim / 2 + i)
    latent: LatentSpec | None  # `head_dim` is then that of keys and values in the cache, and qkv_bias of the latents
    mlp_bias: bool
    activation: Activation
    attention_scale: float  # of the scores
    attention_soft_cap: float | None  # scores become cap · tanh(score / cap)
    logit_soft_cap: float | None
    embedding_scale: float
    residual_scale: float  # of what attention and MLP add to the residual stream
    logit_divisor: float
    tied_embeddings: bool  # the embedding is the output head too
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: StoredDtype  # that the config declares
    quantization: QuantizationSpec | None = None  # of the checkpoint's weights


def load_spec(model_dir: Path) -> ModelSpec:
    """The spec of a model folder. Raises UnsupportedModel, naming file, architecture or field."""
    file = model_dir / "config.json"
    try:
        config: Any = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise UnsupportedModel(f"There is no file {file}") from error
    except ValueError as error:
        raise UnsupportedModel(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UnsupportedModel(f"{file} holds no JSON object")
    return parse_spec(config)


def parse_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json, in the conventions of transformers 4 or 5.

    Raises UnsupportedModel, naming the architecture or the field, for whatever cannot be honoured.
    """
    architecture, family = family_of(config)
    nested = config.get("text_config")
    if family.text_config and isinstance(nested, Mapping):
        config = {**config, **nested}
    fields = ConfigFields(architecture, config, family.defaults)
    num_heads = fields.size("num_attention_heads")
    num_kv_heads = fields.optional_integer("num_key_value_heads") or num_heads
    hidden_size = fields.size("hidden_size")
    latent = _latent(fields) if family.latent_attention else None
    head_dim = _head_dim(fields, latent, hidden_size=hidden_size, num_heads=num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise fields.unsupported(f"{num_heads} heads of {head_dim} over {num_kv_heads} KV heads do not divide evenly")
    if latent and num_heads != num_kv_heads:
        raise fields.unsupported(f"latent attention has a key for each of {num_heads} heads, not {num_kv_heads}")
    _check_fixed(fields, family)
    activation = _activation(fields, family)
    layers = _layers(fields, family, rope_head_dim=latent.rope_dim if latent else head_dim, activation=activation)
    max_positions = fields.size("max_position_embeddings")
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layers=layers,
        max_positions=_with_yarn(max_positions, layers),
        max_stretched_positions=_stretched(_with_yarn(max_positions, layers), layers),
        norm_eps=fields.number("rms_norm_eps"),
        norm_weight_offset=family.norm_weight_offset,
        pre_norm=family.pre_norm,
        post_norm=family.post_norm,
        qk_norm=family.qk_norm,
        qkv_bias=_presence(fields, family.qkv_bias),
        o_bias=_presence(fields, family.o_bias),
        sinks=family.attention_sinks,
        rope_interleaved=_presence(fields, family.rope_interleaved),
        latent=latent,
        mlp_bias=_presence(fields, family.mlp_bias),
        activation=activation,
        attention_scale=_latent_scale(latent, layers) if latent else _attention_scale(fields, family, head_dim),
        attention_soft_cap=fields.optional_number("attn_logit_softcapping") if family.has_attention_soft_cap else None,
        logit_soft_cap=fields.optional_number("final_logit_softcapping") if family.has_logit_soft_cap else None,
        embedding_scale=_embedding_scale(fields, family, hidden_size=hidden_size),
        residual_scale=_multiplier(fields, family, "residual_multiplier"),
        logit_divisor=_multiplier(fields, family, "logits_scaling"),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        bos_token_id=fields.optional_integer("bos_token_id"),
        eos_token_ids=_eos_token_ids(fields),
        dtype=_dtype(fields),
        quantization=_quantization(fields, family),
    )
    fields.refuse_ignored()
    return spec


def family_of(config: Mapping[str, Any]) -> tuple[str, Family]:
    """The architecture that config.json names and what is known of it."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise UnsupportedModel("config.json names no architecture: it must have a list `architectures`")
    for name in names:
        if name in FAMILIES:
            return name, FAMILIES[name]
    raise UnsupportedModel(f"The architecture {names[0]} is not supported. Supported: {', '.join(sorted(FAMILIES))}")


def _check_fixed(fields: ConfigFields, family: Family) -> None:
    for name, values in family.fixed.items():
        value = fields.value(name)
        if value not in values:
            choice = " or ".join(repr(value) for value in values if value is not None)
            raise fields.unsupported(f"`{name}` in config.json cannot be {value!r}, only {choice}")


def _latent(fields: ConfigFields) -> LatentSpec:
    return LatentSpec(
        q_rank=fields.optional_integer("q_lora_rank"),
        kv_rank=fields.size("kv_lora_rank"),
        rope_dim=fields.size("qk_rope_head_dim"),
        nope_dim=fields.size("qk_nope_head_dim"),
        v_dim=fields.size("v_head_dim"),
    )


def _head_dim(fields: ConfigFields, latent: LatentSpec | None, *, hidden_size: int, num_heads: int) -> int:
    if latent:
        return max(latent.rope_dim + latent.nope_dim, latent.v_dim)
    return fields.optional_integer("head_dim") or hidden_size // num_heads


def _layers(
    fields: ConfigFields, family: Family, *, rope_head_dim: int, activation: Activation
) -> tuple[LayerSpec, ...]:
    num_layers = fields.size("num_hidden_layers")
    max_positions = fields.size("max_position_embeddings")
    window = _window(fields, family)
    windowed = _windowed(fields, family, num_layers, window)
    rotated = family.rotated_layers(fields, windowed) if family.rotated_layers else [True] * num_layers
    ropes = {
        sliding: parse_rope(
            fields,
            _layer_type(sliding),
            head_dim=rope_head_dim,
            max_positions=max_positions,
            partial_rotary=family.partial_rotary,
        )
        for sliding in set(windowed)
    }
    moes = parse_moe(fields, family.moe, num_layers, activation) if family.moe else [None] * num_layers
    return tuple(
        LayerSpec(window=window if sliding else None, rope=ropes[sliding] if rotates else None, moe=moe)
        for sliding, rotates, moe in zip(windowed, rotated, moes, strict=True)
    )


def _layer_type(sliding: bool) -> LayerType:
    return "sliding_attention" if sliding else "full_attention"


def _window(fields: ConfigFields, family: Family) -> int | None:
    """The window of the layers that have one; None where no layer has."""
    if family.windowed_layers is None:
        return None
    window = fields.optional_integer("sliding_window")
    if family.window_switch is not None and not fields.flag(family.window_switch):
        return None
    if window is not None and window < 1:
        raise fields.unsupported(f"`sliding_window` in config.json must be at least 1, not {window}")
    return window


def _windowed(fields: ConfigFields, family: Family, num_layers: int, window: int | None) -> list[bool]:
    """Which layers have a window: `layer_types` says, otherwise the family's rule."""
    layer_types = fields.value("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or len(layer_types) != num_layers:
            raise fields.unsupported(f"`layer_types` in config.json must name the type of each of {num_layers} layers")
        for layer_type in layer_types:
            if layer_type not in ("full_attention", "sliding_attention"):
                raise fields.unsupported(f"the layer type {layer_type!r} is not supported")
        sliding = [layer_type == "sliding_attention" for layer_type in layer_types]
        if any(sliding) and window is None:
            raise fields.unsupported("`layer_types` has sliding layers, but no sliding window applies")
        return sliding
    if family.windowed_layers is None or window is None:
        return [False] * num_layers
    return family.windowed_layers(fields, num_layers)


def _with_yarn(max_positions: int, layers: tuple[LayerSpec, ...]) -> int:
    """YaRN is often added to a config whose max_position_embeddings stays that of the training."""
    scalings = [layer.rope.scaling for layer in layers if layer.rope]
    stretched = [int(s.factor * s.trained_positions) for s in scalings if isinstance(s, YarnScaling)]
    return max([max_positions, *stretched])


def _stretched(max_positions: int, layers: tuple[LayerSpec, ...]) -> int:
    scalings = [layer.rope.scaling for layer in layers if layer.rope]
    stretched = [int(s.factor * s.trained_positions) for s in scalings if isinstance(s, DynamicNtkScaling)]
    return max([max_positions, *stretched])


def _presence(fields: ConfigFields, presence: Presence) -> bool:
    if isinstance(presence, bool):
        return presence
    present = [name for name in presence if fields.value(name) is not None]
    return fields.flag(present[0]) if present else False


def _activation(fields: ConfigFields, family: Family) -> Activation:
    names = [fields.value(name) for name in family.activation_fields]
    name = next((name for name in names if name is not None), None)
    if name not in ACTIVATIONS:
        raise fields.unsupported(f"the activation {name!r} is not supported")
    return ACTIVATIONS[name]


def _latent_scale(latent: LatentSpec, layers: tuple[LayerSpec, ...]) -> float:
    """By the size of a key, and by YaRN's temperature, which such models apply to the scores instead."""
    scaling = layers[0].rope.scaling if layers[0].rope else None
    factor = scaling.score_factor if isinstance(scaling, YarnScaling) else 1.0
    return float((latent.rope_dim + latent.nope_dim) ** -0.5) * factor


def _attention_scale(fields: ConfigFields, family: Family, head_dim: int) -> float:
    if family.has_multipliers:
        return _multiplier(fields, family, "attention_multiplier")
    if family.query_scalar_field is not None:
        return float(fields.number(family.query_scalar_field) ** -0.5)
    return float(head_dim**-0.5)


def _embedding_scale(fields: ConfigFields, family: Family, *, hidden_size: int) -> float:
    return float(hidden_size**0.5) if family.scales_embedding else _multiplier(fields, family, "embedding_multiplier")


def _multiplier(fields: ConfigFields, family: Family, name: str) -> float:
    if not family.has_multipliers:
        return 1.0
    multiplier = fields.optional_number(name)
    return 1.0 if multiplier is None else multiplier


def _quantization(fields: ConfigFields, family: Family) -> QuantizationSpec | None:
    """Of linear layers. MXFP4 is of stacked experts alone: `parse_moe` has it, and refuses anything else there."""
    if family.moe is not None and family.moe.may_be_mxfp4:
        return None
    return parse_quantization(fields, head=family.names.head, prefixes=family.prefixes)


def _eos_token_ids(fields: ConfigFields) -> tuple[int, ...]:
    value = fields.value("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise fields.unsupported(f"`eos_token_id` in config.json must be a token id or a list of them, not {value!r}")
    return tuple(ids)


def _dtype(fields: ConfigFields) -> StoredDtype:
    value = fields.value("dtype") or fields.value("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    for dtype in DTYPES:
        if name == dtype:
            return dtype
    raise fields.unsupported(f"the dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
