"""Architecture name → what is particular about the family. Data only.

A family that differs from these in a place that the decoder does not know needs that place added to `Family`,
`ModelSpec` and the decoder, never a decoder of its own.
"""

from dataclasses import replace
from typing import Any

from llmd.model.family import (
    Family,
    MoeFamily,
    TensorNames,
    after_dense_layers,
    after_max_window_layers,
    all_but_every_nth,
    even_layers_before_max_window_layers,
    every_layer,
    listed_rotation,
    sparse_layers,
    unrotated_layers,
    windowed_layers_of_hybrids,
)

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

MIXTRAL = replace(
    MISTRAL,
    names=TensorNames(
        router="block_sparse_moe.gate", expert_down="block_sparse_moe.experts.{expert}.w2",
        expert_gate_up=("block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3"),
    ),
    defaults=LLAMA_DEFAULTS
    | {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 14336,
    },
    moe=MoeFamily(layers=every_layer),
    fixed={"norm_topk_prob": (None, True)},
)  # fmt: skip

QWEN_EXPERTS = MoeFamily(layers=sparse_layers, expert_size_field="moe_intermediate_size", renormalizes=None)
QWEN3_MOE = replace(
    QWEN3,
    defaults=LLAMA_DEFAULTS
    | {
        "max_position_embeddings": 32768, "sliding_window": 4096, "num_key_value_heads": 4, "bos_token_id": None,
        "eos_token_id": None, "decoder_sparse_step": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "intermediate_size": 6144,
    },
    windowed_layers=every_layer,
    moe=QWEN_EXPERTS,
)  # fmt: skip

QWEN2_MOE = replace(
    QWEN2,
    names=TensorNames(
        shared_gate_up=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        shared_down="mlp.shared_expert.down_proj",
    ),
    defaults={
        **QWEN2.defaults, "num_key_value_heads": 16, "qkv_bias": True, "decoder_sparse_step": 1, "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "intermediate_size": 5632,
    },
    qkv_bias=("qkv_bias",),
    windowed_layers=even_layers_before_max_window_layers,
    moe=replace(QWEN_EXPERTS, shared="sized", shared_gate=True),
)  # fmt: skip

GPT_OSS = Family(
    names=TensorNames(
        router="mlp.router", expert_gate_up=("mlp.experts.gate_up_proj",), expert_down="mlp.experts.down_proj"
    ),
    defaults=LLAMA_DEFAULTS
    | {
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "head_dim": 64,
        "num_key_value_heads": 8, "sliding_window": 128, "sliding_window_pattern": 2, "attention_bias": True,
        "bos_token_id": None, "eos_token_id": None, "num_local_experts": 128, "num_experts_per_tok": 4,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    qkv_bias=("attention_bias",),
    o_bias=("attention_bias",),
    windowed_layers=all_but_every_nth,
    attention_sinks=True,
    moe=MoeFamily(
        layers=every_layer, activation="clamped_silu", expert_bias=True, may_be_mxfp4=True, router_bias=True
    ),
    fixed={
        "swiglu_limit": (None, 7), "swiglu_alpha": (None, 1.702), "norm_topk_prob": (None, True),
        "hidden_act": ("silu",),
    },
)  # fmt: skip

DEEPSEEK_EXPERTS = MoeFamily(
    layers=after_dense_layers,
    expert_size_field="moe_intermediate_size",
    renormalizes=False,
    has_scale=True,
    router_in_float32=True,
    group_score="max",
    shared="counted",
)
DEEPSEEK_V2 = Family(
    defaults=LLAMA_DEFAULTS
    | {
        "first_k_dense_replace": 0, "kv_lora_rank": 512, "q_lora_rank": 1536, "n_routed_experts": 64,
        "n_shared_experts": 2, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "routed_scaling_factor": 1.0, "topk_method": "greedy", "moe_intermediate_size": 1407,
    },
    qkv_bias=("attention_bias",),
    o_bias=("attention_bias",),
    rope_interleaved=True,
    latent_attention=True,
    moe=DEEPSEEK_EXPERTS,
    fixed={
        "topk_method": ("greedy", "group_limited_greedy"), "scoring_func": (None, "softmax"),
        "norm_topk_prob": (None, False), "moe_layer_freq": (None, 1), "rope_interleave": (None, True),
    },
)  # fmt: skip

DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    defaults=LLAMA_DEFAULTS
    | {
        "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "n_routed_experts": 256, "n_shared_experts": 1,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "routed_scaling_factor": 2.5,
        "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
        "norm_topk_prob": True, "rope_interleave": True,
    },
    rope_interleaved=("rope_interleave",),
    moe=replace(DEEPSEEK_EXPERTS, scoring="sigmoid", renormalizes=None, choice_bias=True, group_score="top2"),
    fixed={
        "topk_method": (None, "noaux_tc"), "scoring_func": (None, "sigmoid"), "moe_layer_freq": (None, 1),
    },
    # the extra layer that predicts a second token
    ignored_prefixes=("model.layers.{num_layers}.",),
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "Exaone4ForCausalLM": EXAONE4,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3_TEXT_OF_MULTIMODAL,
    "GptOssForCausalLM": GPT_OSS,
    "GraniteForCausalLM": GRANITE,
    "InternLM2ForCausalLM": INTERNLM2,
    "InternLM3ForCausalLM": INTERNLM3,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "MixtralForCausalLM": MIXTRAL,
    "Olmo2ForCausalLM": OLMO2,
    "Phi3ForCausalLM": PHI3,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "SmolLM3ForCausalLM": SMOLLM3,
}
