"""Every family, there and back: a tiny random model of transformers, written as GGUF as its converters write it,
converted, and loaded by transformers again: the same weights, the same configuration, the same logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmd.errors import UnsupportedModel
from llmd.fetch.gguf.convert import convert
from llmd.fetch.progress import ignore_progress
from tests.fetch.gguf_files import F32, TOKENIZER, write_gguf, write_llama

pytestmark = pytest.mark.slow

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
POST_NORM_NAMES = {
    **LAYER_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# what transformers writes of itself, and what has no counterpart because the GGUF carries no such thing
NOT_COMPARED = {"transformers_version", "dtype", "_name_or_path", "architectures", "initializer_range"}
NOT_COMPARED |= {"bos_token_id", "eos_token_id", "pad_token_id", "max_window_layers", "pretraining_tp"}

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 3,
}
LLAMA3 = {
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@dataclass(frozen=True)
class Case:
    """One configuration of a family."""

    model_type: str
    architecture: str  # in GGUF
    config: dict[str, Any]
    metadata: Callable[[Any], dict[str, Any]]  # beyond what all families have
    post_norms: bool = False
    interleaved: bool = False  # q and k, in GGUF
    norm_offset: float = 0.0


def nothing(_config: Any) -> dict[str, Any]:
    return {}


def gemma(config: Any) -> dict[str, Any]:
    metadata = {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    metadata["attention.sliding_window"] = config.sliding_window
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name) is not None:
            metadata[name] = getattr(config, name)
    return metadata


def granite(config: Any) -> dict[str, Any]:
    return {
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def phi3(config: Any) -> dict[str, Any]:
    metadata = {
        "attention.sliding_window": config.sliding_window or 0,
        "rope.scaling.original_context_length": config.original_max_position_embeddings,
        "rope.dimension_count": int(config.rope_parameters["partial_rotary_factor"] * 16),
    }
    if config.rope_parameters["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        ratio = config.max_position_embeddings / original
        metadata["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(ratio) / math.log(original))
    return metadata


def exaone4(config: Any) -> dict[str, Any]:
    if config.sliding_window is None:
        return {}
    pattern = [kind == "sliding_attention" for kind in config.layer_types]
    return {"attention.sliding_window": config.sliding_window, "attention.sliding_window_pattern": pattern}


def scaling(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.yarn_beta_fast": 16.0,
}
FACTORS = {"short_factor": [1.0, 1.25, 1.5, 2.0, 2.5, 3.0], "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 8.0]}
OLMO = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
GEMMA = {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
GEMMA3_LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}

CASES = {
    "llama": Case("llama", "llama", {}, nothing, interleaved=True),
    "llama biases": Case("llama", "llama", {"attention_bias": True, "mlp_bias": True}, nothing, interleaved=True),
    "llama head_dim": Case(
        "llama", "llama", {"head_dim": 32}, lambda _: {"attention.key_length": 32}, interleaved=True
    ),
    "llama tied": Case("llama", "llama", {"tie_word_embeddings": True}, nothing, interleaved=True),
    "llama 3.1": Case("llama", "llama", LLAMA3, lambda _: {"attention.key_length": 64}, interleaved=True),
    "llama linear": Case("llama", "llama", scaling("linear", factor=4.0), lambda _: LINEAR, interleaved=True),
    "llama yarn": Case(
        "llama",
        "llama",
        scaling("yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0),
        lambda _: YARN,
        interleaved=True,
    ),
    "mistral": Case(
        "mistral", "llama", {"sliding_window": 8}, lambda c: {"attention.sliding_window": 8}, interleaved=True
    ),
    "internlm2": Case("llama", "internlm2", {}, nothing, interleaved=True),
    "qwen2": Case("qwen2", "qwen2", {}, nothing),
    "qwen3": Case("qwen3", "qwen3", {"head_dim": 32}, lambda _: {"attention.key_length": 32}),
    "gemma2": Case("gemma2", "gemma2", GEMMA, gemma, post_norms=True, norm_offset=1.0),
    "gemma3": Case(
        "gemma3_text",
        "gemma3",
        {**GEMMA, "num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE},
        lambda config: {**gemma(config), **GEMMA3_LINEAR},
        post_norms=True,
        norm_offset=1.0,
    ),
    "phi3": Case("phi3", "phi3", {"sliding_window": 8, "original_max_position_embeddings": 256}, phi3),
    "phi3 longrope": Case(
        "phi3",
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"rope_type": "longrope", **FACTORS},
        },
        phi3,
    ),
    "granite": Case(
        "granite",
        "granite",
        {
            "attention_multiplier": 0.125,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        granite,
        interleaved=True,
    ),
    "olmo2": Case("olmo2", "olmo2", OLMO, nothing, post_norms=True),
    "exaone4": Case("exaone4", "exaone4", {"sliding_window": 8, "sliding_window_pattern": 4}, exaone4, post_norms=True),
    "exaone4 full": Case(
        "exaone4",
        "exaone4",
        {**LLAMA3, "sliding_window": None, "layer_types": ["full_attention"] * 4},
        lambda _: {"attention.key_length": 64},
        post_norms=True,
    ),
    "smollm3": Case("smollm3", "smollm3", {}, nothing, interleaved=True),
}


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    torch.manual_seed(5)
    model = random_model(case)
    write_model(tmp_path / "m.gguf", model, case)
    folder = convert(tmp_path / "m.gguf", tmp_path / "out", ignore_progress)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]

    assert type(loaded) is type(model)
    assert_same_config(model.config, loaded.config)
    for key, value in model.state_dict().items():
        # adding 1 and taking it away again rounds
        tolerance = 1e-6 if case.norm_offset and "norm" in key else 0.0
        assert torch.allclose(loaded.state_dict()[key], value, rtol=0.0, atol=tolerance), key
    tokens = torch.arange(40).reshape(1, 40)
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-5)


def test_rope_factors_that_are_not_llama3s_are_refused(tmp_path: Path) -> None:
    factors = np.linspace(1.0, 8.0, 16, dtype=np.float32)
    write_llama(tmp_path / "m.gguf", extra_tensors={"rope_freqs.weight": (factors, F32)})
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight are not those of Llama 3"):
        convert(tmp_path / "m.gguf", tmp_path / "out", ignore_progress)


def test_two_rope_scalings_at_once_are_refused(tmp_path: Path) -> None:
    case = CASES["llama 3.1"]
    both = replace(case, metadata=lambda config: {**case.metadata(config), **LINEAR})
    write_model(tmp_path / "m.gguf", random_model(both), both)
    with pytest.raises(UnsupportedModel, match="two rope scalings at once"):
        convert(tmp_path / "m.gguf", tmp_path / "out", ignore_progress)


def random_model(case: Case) -> PreTrainedModel:
    config = AutoConfig.for_model(case.model_type, **{**SIZES, **case.config})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        # norms and biases too, whose initial values would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def write_model(path: Path, model: PreTrainedModel, case: Case) -> None:
    config: Any = model.config
    common = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    common["rope.freq_base"] = rope["rope_theta"]
    settings = {f"{case.architecture}.{key}": value for key, value in {**common, **case.metadata(config)}.items()}
    tensors = {gguf_name(key, case): gguf_values(key, value, case, config) for key, value in weights(model).items()}
    tensors |= rope_tensors(config, rope)
    vocabulary = [*TOKENIZER["tokenizer.ggml.tokens"]]
    assert len(vocabulary) <= config.vocab_size
    stored = {name: (values, F32) for name, values in tensors.items()}
    write_gguf(path, case.architecture, {**settings, **TOKENIZER}, stored)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    tied = bool(model.config.tie_word_embeddings)
    return {key: value for key, value in model.state_dict().items() if not (tied and key == "lm_head.weight")}


def gguf_name(key: str, case: Case) -> str:
    module, kind = key.rsplit(".", 1)
    if module in OTHER_NAMES:
        return f"{OTHER_NAMES[module]}.{kind}"
    layer, module = module.removeprefix("model.layers.").split(".", 1)
    names = POST_NORM_NAMES if case.post_norms else LAYER_NAMES
    return f"blk.{layer}.{names[module]}.{kind}"


def gguf_values(key: str, value: torch.Tensor, case: Case, config: Any) -> NDArray[np.float32]:
    if case.interleaved and ("q_proj" in key or "k_proj" in key):
        heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
        halves = value.unflatten(0, (heads, 2, -1))
        value = halves.transpose(1, 2).flatten(0, 2)
    if "norm" in key:
        value = value + case.norm_offset
    return value.detach().contiguous().numpy()


def rope_tensors(config: PreTrainedConfig, rope: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32) for kind in ("short", "long")
        }
    if rope["rope_type"] != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head_dim = 2 * len(scaled)
    plain = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    return {"rope_freqs.weight": (plain / scaled.numpy()).astype(np.float32)}


def assert_same_config(original: PreTrainedConfig, converted: PreTrainedConfig) -> None:
    expected, found = original.to_dict(), converted.to_dict()
    for key in expected.keys() - NOT_COMPARED:
        assert found[key] == expected[key] or (not found[key] and not expected[key]), key
