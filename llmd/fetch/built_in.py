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
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "vocab_size": 32768,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }
    | _sizes(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, tied=False),
    "qwen3-0.6b": _QWEN_3 | _sizes(hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, tied=True),
    "qwen3-8b": _QWEN_3 | _sizes(hidden=4096, intermediate=12288, layers=36, heads=32, kv_heads=8, tied=False),
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 49152,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": "bfloat16",
    }
    | _sizes(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, tied=True),
}  # fmt: skip
