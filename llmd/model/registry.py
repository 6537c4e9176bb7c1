"""Architecture name → what is particular about the family. Data only: no tensors, and no code for one family alone.

A family that differs from these in a place that the decoder does not know needs that place added to `Family`,
`ModelSpec` and the decoder, never a decoder of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llmd.model.config_fields import ConfigFields

# A bias is always there, never there, or as the first of these config fields that is not null says
Bias = bool | tuple[str, ...]
# (config, number of layers) → which layers have a window
WindowRule = Callable[[ConfigFields, int], list[bool]]
# (config, which layers have a window) → which layers rotate
RotationRule = Callable[[ConfigFields, list[bool]], list[bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """What the parts of a checkpoint are called, without `.weight` and `.bias`; layer parts follow the layer's prefix.

    `qkv`: three names, or one for a tensor that holds all of them: rows q, k, v one after the other ("fused"), or for
    each KV head its queries, its key and its value ("grouped"). `gate_up`: two names, or one for both.
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
    attention_norm: str = "input_layernorm"
    attention_output_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp_output_norm: str = "post_feedforward_layernorm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one architecture differs from the plain Llama."""

    names: TensorNames = field(default_factory=TensorNames)
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what the reference assumes of absent config fields
    pre_norm: bool = True  # a norm before attention and MLP
    post_norm: bool = False  # a norm after attention and MLP, before the residual addition
    norm_weight_offset: float = 0.0
    qk_norm: Literal["none", "head", "projection"] = "none"
    qkv_bias: Bias = False
    o_bias: Bias = False
    mlp_bias: Bias = False
    activation_fields: tuple[str, ...] = ("hidden_act",)  # the first that is not null counts
    windowed_layers: WindowRule | None = None  # where `layer_types` is silent; None = the family has no windows
    window_switch: str | None = None  # config field without which there is no window
    rotated_layers: RotationRule | None = None  # None = all
    partial_rotary: bool = False
    has_attention_soft_cap: bool = False
    has_logit_soft_cap: bool = False
    scales_embedding: bool = False  # by sqrt(hidden_size)
    has_multipliers: bool = False  # Granite's four, the attention's among them
    query_scalar_field: str | None = None  # attention divides by the root of this; None = of head_dim
    text_config: bool = False  # the language model is described by a nested `text_config`
    prefixes: tuple[tuple[str, str], ...] = ()  # of tensor names: as found → as `names` has them
    ignored_prefixes: tuple[str, ...] = ()  # tensors of parts that are not served


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


SANDWICH_NAMES = TensorNames(mlp_norm="pre_feedforward_layernorm")

LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = Family(
    defaults=LLAMA_DEFAULTS, qkv_bias=("attention_bias",), o_bias=("attention_bias",), mlp_bias=("mlp_bias",)
)

MISTRAL = Family(
    defaults=LLAMA_DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    windowed_layers=every_layer,
)

QWEN2 = Family(
    defaults=LLAMA_DEFAULTS
    | {
        "max_position_embeddings": 32768, "max_window_layers": 28, "sliding_window": 4096, "num_key_value_heads": 32,
        "bos_token_id": None, "eos_token_id": None,
    },
    qkv_bias=True,
    windowed_layers=after_max_window_layers,
    window_switch="use_sliding_window",
)  # fmt: skip

QWEN3 = replace(
    QWEN2,
    defaults={**QWEN2.defaults, "head_dim": 128},
    qkv_bias=("attention_bias",),
    o_bias=("attention_bias",),
    qk_norm="head",
)

GEMMA2 = Family(
    names=SANDWICH_NAMES,
    defaults={
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "head_dim": 256, "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 2,
        "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2, "eos_token_id": 1,
    },
    post_norm=True,
    norm_weight_offset=1.0,
    qkv_bias=("attention_bias",),
    o_bias=("attention_bias",),
    activation_fields=("hidden_activation", "hidden_act"),
    windowed_layers=all_but_every_nth,
    has_attention_soft_cap=True,
    has_logit_soft_cap=True,
    scales_embedding=True,
    query_scalar_field="query_pre_attn_scalar",
)  # fmt: skip

GEMMA3 = replace(
    GEMMA2,
    defaults={
        **GEMMA2.defaults, "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "max_position_embeddings": 131072, "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6, "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    has_attention_soft_cap=False,
    qk_norm="head",
)  # fmt: skip

GEMMA3_TEXT_OF_MULTIMODAL = replace(
    GEMMA3,
    text_config=True,
    prefixes=(("language_model.model.", "model."), ("model.language_model.", "model."), ("language_model.", "")),
    ignored_prefixes=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)

PHI3 = Family(
    names=TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    defaults=LLAMA_DEFAULTS
    | {
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "sliding_window": None, "eos_token_id": 32000,
    },
    windowed_layers=every_layer,
    partial_rotary=True,
)  # fmt: skip

INTERNLM2 = Family(
    names=TensorNames(
        embedding="model.tok_embeddings", head="output", qkv=("attention.wqkv",), qkv_rows="grouped", o="attention.wo",
        gate_up=("feed_forward.w1", "feed_forward.w3"), down="feed_forward.w2", attention_norm="attention_norm",
        mlp_norm="ffn_norm",
    ),
    defaults=LLAMA_DEFAULTS | {"bias": True},
    qkv_bias=("bias",),
    o_bias=("bias",),
)  # fmt: skip

INTERNLM3 = Family(
    defaults=LLAMA_DEFAULTS
    | {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "num_key_value_heads": 2, "head_dim": 128},
    qkv_bias=("qkv_bias", "attention_bias"),
    o_bias=("bias", "mlp_bias"),
    mlp_bias=("bias", "mlp_bias"),
)

GRANITE = replace(LLAMA, has_multipliers=True)

OLMO2 = Family(
    defaults=LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279},
    pre_norm=False,
    post_norm=True,
    qkv_bias=("attention_bias",),
    o_bias=("attention_bias",),
    qk_norm="projection",
)

SMOLLM3 = replace(
    LLAMA,
    defaults=LLAMA_DEFAULTS
    | {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True,
        "no_rope_layer_interval": 4, "bos_token_id": 128000, "eos_token_id": 128001,
    },
    windowed_layers=unrotated_layers,
    window_switch="use_sliding_window",
    rotated_layers=listed_rotation,
)  # fmt: skip

EXAONE4 = Family(
    defaults=LLAMA_DEFAULTS
    | {
        "rms_norm_eps": 1e-5, "num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4,
        "bos_token_id": 0,
    },
    pre_norm=False,
    post_norm=True,
    qk_norm="head",
    windowed_layers=all_but_every_nth,
    rotated_layers=windowed_layers_of_hybrids,
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "Exaone4ForCausalLM": EXAONE4,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3_TEXT_OF_MULTIMODAL,
    "GraniteForCausalLM": GRANITE,
    "InternLM2ForCausalLM": INTERNLM2,
    "InternLM3ForCausalLM": INTERNLM3,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Olmo2ForCausalLM": OLMO2,
    "Phi3ForCausalLM": PHI3,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "SmolLM3ForCausalLM": SMOLLM3,
}
