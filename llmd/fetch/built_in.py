"""Configurations of well-known models, by name: what their config.json says. Data only, for `--load-format dummy`.

From the models' own repositories. They say what a model computes, not what it has learned.
"""

from collections.abc import Mapping
from typing import Any

_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "torch_dtype": "bfloat16",
}  # fmt: skip
_QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "vocab_size": 151936,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "head_dim": 128,
    "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645, "torch_dtype": "bfloat16",
}  # fmt: skip
_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_act": "silu", "vocab_size": 201088,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "head_dim": 64,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "sliding_window": 128, "attention_bias": True, "num_experts_per_tok": 4, "swiglu_limit": 7.0,
    "eos_token_id": 200002, "torch_dtype": "bfloat16",
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"
        ],
        "quant_method": "mxfp4",
    },
}  # fmt: skip
_DEEPSEEK_YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip


def _llama_3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


def _sizes(*, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied,
    }  # fmt: skip


BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    "llama-3.2-1b": _LLAMA_3
    | {"rope_scaling": _llama_3_rope(32.0), "head_dim": 64}
    | _sizes(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, tied=True),
    "llama-3.1-8b": _LLAMA_3
    | {"rope_scaling": _llama_3_rope(8.0)}
    | _sizes(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, tied=False),
    "llama-3.1-70b": _LLAMA_3
    | {"rope_scaling": _llama_3_rope(8.0)}
    | _sizes(hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8, tied=False),
    "deepseek-v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_act": "silu",
        "vocab_size": 102400, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "rope_scaling": _DEEPSEEK_YARN, "bos_token_id": 100000, "eos_token_id": 100001, "torch_dtype": "bfloat16",
        "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
        "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    }
    | _sizes(hidden=2048, intermediate=10944, layers=27, heads=16, kv_heads=16, tied=False),
    "gpt-oss-20b": _GPT_OSS
    | {"num_local_experts": 32}
    | _sizes(hidden=2880, intermediate=2880, layers=24, heads=64, kv_heads=8, tied=False),
    "gpt-oss-120b": _GPT_OSS
    | {"num_local_experts": 128}
    | _sizes(hidden=2880, intermediate=2880, layers=36, heads=64, kv_heads=8, tied=False),
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "vocab_size": 32000,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
        "num_local_experts": 8, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    | _sizes(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, tied=False),
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "vocab_size": 32768,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }
    | _sizes(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, tied=False),
    "qwen3-0.6b": _QWEN_3 | _sizes(hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, tied=True),
    "qwen3-8b": _QWEN_3 | _sizes(hidden=4096, intermediate=12288, layers=36, heads=32, kv_heads=8, tied=False),
    "qwen3-30b-a3b": _QWEN_3
    | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    | _sizes(hidden=2048, intermediate=6144, layers=48, heads=32, kv_heads=4, tied=False),
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 49152,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": "bfloat16",
    }
    | _sizes(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, tied=True),
}  # fmt: skip
