"""Tiny random models of every family, made and run by transformers: the oracle of the decoder."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

VOCAB_SIZE = 96
WINDOW = 6
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD_16 = {"head_dim": 16}
GEMMA_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.5, 7.0],
    "original_max_position_embeddings": 64,
}

EXPERTS_5 = {"num_local_experts": 5, "num_experts_per_tok": 2}
EXPERTS_7 = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
GPT_OSS = {
    **HEAD_16, **EXPERTS_5, "sliding_window": WINDOW, "max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "original_max_position_embeddings": 8,
        "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False,
    },
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.7, "num_key_value_heads": 6, "kv_lora_rank": 16,
    "qk_nope_head_dim": 14, "qk_rope_head_dim": 8, "v_head_dim": 10,
}  # fmt: skip
DEEPSEEK_YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "original_max_position_embeddings": 8,
        "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 0.7, "mscale_all_dim": 1.4,
    }
}  # fmt: skip


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1000.0, **parameters}}


# name of the case → model_type, config fields beside SIZES
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases, odd heads, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 10},
    ),
    "llama, gelu": ("llama", {"hidden_act": "gelu"}),
    "llama, linear rope": ("llama", rope("linear", factor=3.0)),
    "llama, dynamic rope": ("llama", rope("dynamic", factor=3.0) | {"max_position_embeddings": 24}),
    "llama, llama3 rope": (
        "llama",
        rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24
        ),
    ),
    "llama, yarn rope": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral without window": ("mistral", {"sliding_window": None, **HEAD_16}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": ("qwen3", HEAD_16),
    "qwen3, yarn": ("qwen3", HEAD_16 | rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "gemma2": (
        "gemma2",
        {
            **HEAD_16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {**HEAD_16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "rope_parameters": GEMMA_ROPES}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3, longrope, short": (
        "phi3",
        {
            "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64, "max_position_embeddings": 64,
            "rope_parameters": LONGROPE, "attention_dropout": 0.0,
        },
    ),
    "phi3, longrope, long": (
        "phi3",
        {
            "partial_rotary_factor": 0.75, "original_max_position_embeddings": 16, "max_position_embeddings": 64,
            "rope_parameters": LONGROPE | {"original_max_position_embeddings": 16},
        },
    ),
    "internlm3": ("internlm3", {**HEAD_16, "attention_bias": True, "mlp_bias": True}),
    "internlm3, dynamic rope": (
        "internlm3", HEAD_16 | rope("dynamic", factor=6.0) | {"max_position_embeddings": 24},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.5,
            "attention_multiplier": 0.2, "attention_bias": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {}),
    "smollm3 with windows": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "exaone4, hybrid": ("exaone4", {**HEAD_16, "sliding_window": WINDOW, "sliding_window_pattern": 3}),
    "mixtral": ("mixtral", EXPERTS_5),
    "mixtral with windows": ("mixtral", EXPERTS_5 | {"sliding_window": WINDOW, "num_experts_per_tok": 3}),
    "qwen2 moe": ("qwen2_moe", EXPERTS_7 | {"shared_expert_intermediate_size": 40}),
    "qwen2 moe, some dense layers, windows": (
        "qwen2_moe",
        EXPERTS_7
        | {
            "shared_expert_intermediate_size": 40, "norm_topk_prob": True, "decoder_sparse_step": 2,
            "qkv_bias": False, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3,
        },
    ),
    "qwen3 moe": ("qwen3_moe", EXPERTS_7 | HEAD_16 | {"norm_topk_prob": True}),
    "qwen3 moe, some dense layers": (
        "qwen3_moe",
        EXPERTS_7
        | HEAD_16
        | {"norm_topk_prob": False, "mlp_only_layers": [0, 3], "attention_bias": True, "hidden_act": "gelu"},
    ),
    "qwen3 moe, windows": (
        "qwen3_moe",
        EXPERTS_7 | HEAD_16 | {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "gpt-oss": ("gpt_oss", GPT_OSS),
    "gpt-oss, other layers, no biases": (
        "gpt_oss",
        GPT_OSS
        | {
            "attention_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "deepseek v2": ("deepseek_v2", DEEPSEEK | {"q_lora_rank": None}),
    "deepseek v2, groups, yarn, biases": (
        "deepseek_v2",
        DEEPSEEK
        | {
            "q_lora_rank": 20, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
            "attention_bias": True, "num_experts_per_tok": 3, "first_k_dense_replace": 0, **DEEPSEEK_YARN,
        },
    ),
    "deepseek v3": ("deepseek_v3", DEEPSEEK | {"q_lora_rank": 20, "n_group": 4, "topk_group": 2, **DEEPSEEK_YARN}),
    "deepseek v3, wide values, halves turn": (
        "deepseek_v3",
        DEEPSEEK
        | {
            "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_interleave": False, "v_head_dim": 26,
            "norm_topk_prob": False,
        },
    ),
    "exaone4, full": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
}  # fmt: skip


def make_reference(model_type: str, fields: dict[str, Any], *, seed: int = 0) -> PreTrainedModel:
    """A random model on float32; every parameter differs from what its initialization leaves alone."""
    fields = {name: dict(value) if isinstance(value, dict) else value for name, value in (SIZES | fields).items()}
    config = AutoConfig.for_model(model_type, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomized(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed)


def make_multimodal_gemma3() -> PreTrainedModel:
    """Gemma 3 with an eye that text never uses."""
    text = SIZES | HEAD_16 | {"sliding_window": WINDOW, "sliding_window_pattern": 2}
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return randomized(Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager"))


def randomized(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                # norms and biases: around where they start, far enough to matter
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * 1.2 / parameter.shape[1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # as far apart as the scores themselves
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, sequences: list[list[int]]) -> list[Tensor]:
    """[len(sequence), vocab_size] float32 each, without a cache."""
    return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in sequences]


def save_reference(model: PreTrainedModel, folder: Path, **config_changes: Any) -> Path:
    """As a model folder; fields of config.json can be replaced, or removed with None."""
    model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | config_changes
    file.write_text(json.dumps({name: value for name, value in config.items() if name not in config_changes or value}))
    return folder
