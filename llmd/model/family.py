"""The ways in which an architecture may differ from the plain Llama: names of tensors, traits, rules by layer.

Data only: no tensors, and no code for one family alone. Which family differs how is in `registry.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmd.model.config_fields import ConfigFields

# Something is always there, never there, or as the first of these config fields that is not null says
Presence = bool | tuple[str, ...]
# (config, number of layers) → which layers have a window, or experts
LayerRule = Callable[[ConfigFields, int], list[bool]]
# (config, which layers have a window) → which layers rotate
RotationRule = Callable[[ConfigFields, list[bool]], list[bool]]
ExpertActivation = Literal["silu", "gelu_tanh", "gelu", "clamped_silu"]
Scoring = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """What the parts of a checkpoint are called, without `.weight` and `.bias`; layer parts follow the layer's prefix.

    `qkv`: three names, or one for a tensor that holds all of them: rows q, k, v one after the other ("fused"), or for
    each KV head its queries, its key and its value ("grouped"). `gate_up`: two names, or one for both.
    `expert_gate_up` and `expert_down`: a matrix for each expert, or, where no `{expert}` is in them, all experts' in
    one tensor, transposed, gate's and up's rows alternating; such names stand without `.weight`, and with `_bias`.
    """

    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{index}"
    norm: str = "model.norm"
    head: str = "lm_head"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_rows: Literal["fused", "grouped"] = "fused"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    sinks: str = "self_attn.sinks"
    q_a: str = "self_attn.q_a_proj"
    q_a_norm: str = "self_attn.q_a_layernorm"
    q_b: str = "self_attn.q_b_proj"
    kv_a: str = "self_attn.kv_a_proj_with_mqa"
    kv_a_norm: str = "self_attn.kv_a_layernorm"
    kv_b: str = "self_attn.kv_b_proj"
    router: str = "mlp.gate"
    choice_bias: str = "mlp.gate.e_score_correction_bias"
    expert_gate_up: tuple[str, ...] = ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj")
    expert_down: str = "mlp.experts.{expert}.down_proj"
    shared_gate_up: tuple[str, ...] = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
    shared_down: str = "mlp.shared_experts.down_proj"
    shared_gate: str = "mlp.shared_expert_gate"
    attention_norm: str = "input_layernorm"
    attention_output_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp_output_norm: str = "post_feedforward_layernorm"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeFamily:
    """How one architecture's experts differ from Mixtral's."""

    layers: LayerRule  # which have experts
    expert_size_field: str = "intermediate_size"
    activation: ExpertActivation | None = None  # None = the model's
    expert_bias: bool = False
    may_be_mxfp4: bool = False
    scoring: Scoring = "softmax"
    renormalizes: bool | None = True  # the weights of the chosen experts; None = as `norm_topk_prob` says
    has_scale: bool = False  # `routed_scaling_factor`
    router_bias: bool = False
    router_in_float32: bool = False
    choice_bias: bool = False
    group_score: GroupScore | None = None  # of groups of experts; None = the family has no groups
    # an expert for every token: as wide as so many of the others ("counted"), or of a size of its own ("sized")
    shared: Literal["counted", "sized"] | None = None
    shared_gate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one architecture differs from the plain Llama."""

    names: TensorNames = field(default_factory=TensorNames)
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what the reference assumes of absent config fields
    pre_norm: bool = True  # a norm before attention and MLP
    post_norm: bool = False  # a norm after attention and MLP, before the residual addition
    norm_weight_offset: float = 0.0
    qk_norm: Literal["none", "head", "projection"] = "none"
    qkv_bias: Presence = False
    o_bias: Presence = False
    mlp_bias: Presence = False
    activation_fields: tuple[str, ...] = ("hidden_act",)  # the first that is not null counts
    windowed_layers: LayerRule | None = None  # where `layer_types` is silent; None = the family has no windows
    window_switch: str | None = None  # config field without which there is no window
    rotated_layers: RotationRule | None = None  # None = all
    partial_rotary: bool = False
    rope_interleaved: Presence = False  # pairs (2i, 2i + 1) turn; said as a bias is
    attention_sinks: bool = False
    latent_attention: bool = False  # DeepSeek's MLA
    moe: MoeFamily | None = None
    # config fields that the reference knows with these values only
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    has_attention_soft_cap: bool = False
    has_logit_soft_cap: bool = False
    scales_embedding: bool = False  # by sqrt(hidden_size)
    has_multipliers: bool = False  # Granite's four, the attention's among them
    query_scalar_field: str | None = None  # attention divides by the root of this; None = of head_dim
    text_config: bool = False  # the language model is described by a nested `text_config`
    prefixes: tuple[tuple[str, str], ...] = ()  # of tensor names: as found → as `names` has them
    ignored_prefixes: tuple[str, ...] = ()  # tensors of parts that are not served; may have {num_layers}


def every_layer(_fields: ConfigFields, num_layers: int) -> list[bool]:
    return [True] * num_layers


def after_max_window_layers(fields: ConfigFields, num_layers: int) -> list[bool]:
    first = fields.integer("max_window_layers")
    return [index >= first for index in range(num_layers)]


def all_but_every_nth(fields: ConfigFields, num_layers: int) -> list[bool]:
    """`sliding_window_pattern`: n = all but every n-th layer; "LLLG" = as it says, and never the last layer."""
    pattern = fields.value("sliding_window_pattern")
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        return [pattern[index % len(pattern)] == "L" and index < num_layers - 1 for index in range(num_layers)]
    if isinstance(pattern, int) and pattern > 0:
        return [(index + 1) % pattern != 0 for index in range(num_layers)]
    raise fields.unsupported(f"`sliding_window_pattern` in config.json cannot be {pattern!r}")


def even_layers_before_max_window_layers(fields: ConfigFields, num_layers: int) -> list[bool]:
    end = fields.integer("max_window_layers")
    return [index % 2 == 0 and index < end for index in range(num_layers)]


def sparse_layers(fields: ConfigFields, num_layers: int) -> list[bool]:
    """Every `decoder_sparse_step`-th layer that is not in `mlp_only_layers`."""
    step, dense = fields.size("decoder_sparse_step"), fields.value("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(index, int) for index in dense):
        raise fields.unsupported(f"`mlp_only_layers` in config.json must be a list of layer numbers, not {dense!r}")
    return [(index + 1) % step == 0 and index not in dense for index in range(num_layers)]


def after_dense_layers(fields: ConfigFields, num_layers: int) -> list[bool]:
    first = fields.integer("first_k_dense_replace")
    return [index >= first for index in range(num_layers)]


def windowed_layers_of_hybrids(fields: ConfigFields, windowed: list[bool]) -> list[bool]:
    """The layers with a window; all of them in a model without windows."""
    return [True] * len(windowed) if fields.value("sliding_window") is None else windowed


def listed_rotation(fields: ConfigFields, windowed: list[bool]) -> list[bool]:
    """`no_rope_layers` has a 1 for each layer that does rotate; without it, all but every n-th layer do."""
    num_layers = len(windowed)
    flags = fields.value("no_rope_layers")
    interval = fields.size("no_rope_layer_interval")
    if flags is None:
        return [(index + 1) % interval != 0 for index in range(num_layers)]
    if not isinstance(flags, list) or len(flags) < num_layers or not set(flags) <= {0, 1}:
        raise fields.unsupported(f"`no_rope_layers` in config.json must have a 0 or 1 for each of {num_layers} layers")
    return [bool(flag) for flag in flags[:num_layers]]


def unrotated_layers(fields: ConfigFields, num_layers: int) -> list[bool]:
    return [not rotates for rotates in listed_rotation(fields, [False] * num_layers)]
