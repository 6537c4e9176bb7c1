"""Which GGUF architectures are converted, and what each becomes: `config.json` and the list of tensors.

A family is data. The target is what `transformers` has for it; tensor names in GGUF come from the `gguf` package's
tables, save where GGUF changed the weights themselves:
- architectures that came from Llama keep the two halves of each rotary pair next to each other in q and k;
- Gemma's norm weights have had 1 added.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, TensorNameMap, get_tensor_name_map
from numpy.typing import NDArray

from llmd.errors import UnsupportedModel
from llmd.fetch.gguf import rope
from llmd.fetch.gguf.file import GgufFile, GgufTensor
from llmd.fetch.gguf.weights import PlannedTensor

Config = dict[str, Any]

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_GEMMA_NORMS = ("input_layernorm", *_POST_NORMS, "pre_feedforward_layernorm")
_LLAMA_LAYER = (*_ATTENTION, *_MLP, *_PRE_NORMS)

_ATTENTION_BIAS = {"attention_bias": _ATTENTION}
_ALL_BIASES = {**_ATTENTION_BIAS, "mlp_bias": _MLP}


@dataclass(frozen=True, slots=True)
class Family:
    """What one GGUF architecture becomes."""

    class_name: str  # in `architectures` of config.json
    model_type: str
    layer_modules: tuple[str, ...]  # below model.layers.N, each with a `.weight`
    extra_config: Callable[[GgufFile], Config]  # beyond what all families have
    biased_modules: tuple[str, ...] = ()  # always with a `.bias`
    bias_flags: Mapping[str, tuple[str, ...]] | None = None  # config flag → modules with a `.bias` if the file has them
    interleaved_qk: bool = False
    norm_offset: float = 0.0  # what GGUF added to norm weights


def family_of(file: GgufFile) -> Family:
    """The family of a file. Raises UnsupportedModel, naming the architecture, if there is none."""
    name = file.architecture
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(
            f"{file.path} has the GGUF architecture {name!r}, which llmd does not convert. It converts: {known}."
        )
    if num_experts := file.setting("expert_count", 0):
        raise UnsupportedModel(f"{file.path}: {name} with {num_experts} experts is not supported, only dense models.")
    family = FAMILIES[name]
    if family is _LLAMA and file.setting("attention.sliding_window"):
        return _MISTRAL
    return family


def build_config(file: GgufFile, family: Family) -> Config:
    """The content of `config.json`, as transformers reads it."""
    config = _common_config(file)
    config |= {"architectures": [family.class_name], "model_type": family.model_type}
    names = _name_map(file)
    for flag, modules in (family.bias_flags or {}).items():
        config[flag] = f"{_gguf_name(names, f'model.layers.0.{modules[0]}')}.bias" in file.tensors
    return config | family.extra_config(file)


def plan_tensors(file: GgufFile, family: Family, config: Config) -> list[PlannedTensor]:
    """Every tensor of the model in the file's order. Raises UnsupportedModel if one is missing or left over."""
    names = _name_map(file)
    sources: dict[str, str] = {}  # GGUF name → name in transformers
    for name in _expected_names(family, config):
        module, _, kind = name.rpartition(".")
        sources[f"{_gguf_name(names, module)}.{kind}"] = name
    missing = sources.keys() - file.tensors.keys()
    left_over = file.tensors.keys() - sources.keys() - rope.TENSORS
    if missing or left_over:
        problem = f"tensor {min(missing)} is missing" if missing else f"there is no place for tensor {min(left_over)}"
        raise UnsupportedModel(f"{file.path} is not a {family.class_name} as llmd knows it: {problem}.")
    return [
        _plan(file, family, config, gguf_name=gguf_name, name=sources[gguf_name])
        for gguf_name in file.tensors
        if gguf_name in sources
    ]


def _plan(file: GgufFile, family: Family, config: Config, *, gguf_name: str, name: str) -> PlannedTensor:
    source = file.tensors[gguf_name]
    order = None
    if family.interleaved_qk and ".self_attn.q_proj." in name:
        order = _deinterleaved(source, num_heads=config["num_attention_heads"], head_dim=config["head_dim"])
    elif family.interleaved_qk and ".self_attn.k_proj." in name:
        order = _deinterleaved(source, num_heads=config["num_key_value_heads"], head_dim=config["head_dim"])
    is_norm = name.endswith("norm.weight")
    return PlannedTensor(name, source, row_order=order, offset=-family.norm_offset if is_norm else 0.0)


def _deinterleaved(source: GgufTensor, *, num_heads: int, head_dim: int) -> NDArray[np.intp]:
    """For each row of a q or k projection, its row in GGUF, where element i and i + head_dim / 2 are neighbours."""
    if source.shape[0] != num_heads * head_dim:
        raise UnsupportedModel(
            f"Tensor {source.name} has {source.shape[0]} rows, but {num_heads} heads of {head_dim} need "
            f"{num_heads * head_dim}."
        )
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).ravel()


def _expected_names(family: Family, config: Config) -> list[str]:
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    if not config["tie_word_embeddings"]:
        names.append("lm_head.weight")
    biased = set(family.biased_modules)
    for flag, modules in (family.bias_flags or {}).items():
        biased |= set(modules) if config[flag] else set()
    for layer in range(config["num_hidden_layers"]):
        for module in family.layer_modules:
            names.append(f"model.layers.{layer}.{module}.weight")
            if module in biased:
                names.append(f"model.layers.{layer}.{module}.bias")
    return names


def _name_map(file: GgufFile) -> TensorNameMap:
    arch = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == file.architecture)
    return get_tensor_name_map(arch, _num_layers(file))


def _num_layers(file: GgufFile) -> int:
    num_layers = int(file.required_setting("block_count"))
    # names are made for every layer, so that a damaged number must not be believed
    if not 0 < num_layers <= len(file.tensors):
        raise UnsupportedModel(f"{file.path}: {num_layers} layers in {len(file.tensors)} tensors cannot be.")
    return num_layers


def _gguf_name(names: TensorNameMap, module: str) -> str:
    name = names.get_name(module)
    if name is None:
        raise UnsupportedModel(f"the installed gguf package has no name for {module}. Update it: pip install -U gguf")
    return str(name)


def _common_config(file: GgufFile) -> Config:
    num_heads = _one_number(file, "attention.head_count")
    hidden_size = file.required_setting("embedding_length")
    head_dim = file.setting("attention.key_length", hidden_size // num_heads)
    if file.setting("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(f"{file.path}: keys and values of different sizes are not supported.")
    rotary_dim = file.setting("rope.dimension_count", head_dim)
    if rotary_dim != head_dim and file.architecture != "phi3":
        raise UnsupportedModel(f"{file.path}: rotating {rotary_dim} of {head_dim} elements of a head is not supported.")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise UnsupportedModel(f"{file.path}: tensor token_embd.weight is missing.")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": _one_number(file, "feed_forward_length"),
        "num_hidden_layers": _num_layers(file),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _one_number(file, "attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": file.required_setting("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": file.required_setting("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **rope.rope_config(file, rotary_dim),
        "attention_dropout": 0.0,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": _main_dtype(file),
        "use_cache": True,
    }


def _one_number(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.setting(key, default) if default is not None else file.required_setting(key)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise UnsupportedModel(f"{file.path}: {key} differs between layers, which is not supported.")
        value = value[0]
    return int(value)


def _main_dtype(file: GgufFile) -> str:
    largest = max(file.tensors.values(), key=lambda tensor: tensor.rows.nbytes)
    exact = {GGMLQuantizationType.F32: "float32", GGMLQuantizationType.F16: "float16"}
    return exact.get(largest.type, "bfloat16")


def _nothing(_file: GgufFile) -> Config:
    return {}


def _mistral(file: GgufFile) -> Config:
    return {"sliding_window": file.required_setting("attention.sliding_window")}


def _qwen(_file: GgufFile) -> Config:
    return {"use_sliding_window": False, "sliding_window": None}


def _gemma2(file: GgufFile) -> Config:
    return {
        **_gemma(file, largest_num_layers=46, period=2),
        "attn_logit_softcapping": file.required_setting("attn_logit_softcapping"),
        "final_logit_softcapping": file.required_setting("final_logit_softcapping"),
    }


def _gemma3(file: GgufFile) -> Config:
    return {
        **_gemma(file, largest_num_layers=62, period=6),
        "rope_local_base_freq": file.setting("rope.freq_base_swa", 10000.0),
        "rope_theta": file.setting("rope.freq_base", 1_000_000.0),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": file.setting("final_logit_softcapping"),
    }


def _gemma(file: GgufFile, *, largest_num_layers: int, period: int) -> Config:
    num_heads = file.required_setting("attention.head_count")
    hidden_size = file.required_setting("embedding_length")
    head_dim = file.setting("attention.key_length", hidden_size // num_heads)
    # GGUF does not keep it; only the family's largest model (27B, known by its layers) scales by another size
    is_largest = _num_layers(file) == largest_num_layers
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden_size // num_heads if is_largest else head_dim,
        "sliding_window": file.required_setting("attention.sliding_window"),
        "layer_types": _layer_types(file, period),
    }


def _phi3(file: GgufFile) -> Config:
    head_dim = file.required_setting("embedding_length") // file.required_setting("attention.head_count")
    rotary_dim = file.setting("rope.dimension_count", head_dim)
    context = file.required_setting("context_length")
    return {
        "original_max_position_embeddings": file.setting("rope.scaling.original_context_length", context),
        "partial_rotary_factor": rotary_dim / head_dim,
        # the file says 0 for none
        "sliding_window": file.setting("attention.sliding_window") or None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }


def _granite(file: GgufFile) -> Config:
    head_dim = file.required_setting("embedding_length") // file.required_setting("attention.head_count")
    return {
        "attention_multiplier": file.setting("attention.scale", head_dim**-0.5),
        "embedding_multiplier": file.setting("embedding_scale", 1.0),
        "residual_multiplier": file.setting("residual_scale", 1.0),
        "logits_scaling": file.setting("logit_scale", 1.0),
    }


def _olmo2(file: GgufFile) -> Config:
    if file.setting("attention.sliding_window"):
        raise UnsupportedModel(f"{file.path} is an OLMo 3 (a sliding window), which llmd does not convert.")
    return {}


def _exaone4(file: GgufFile) -> Config:
    window = file.setting("attention.sliding_window")
    if not window:
        layer_types = ["full_attention"] * _num_layers(file)
        return {"sliding_window": None, "layer_types": layer_types}
    return {"sliding_window": window, "layer_types": _layer_types(file, 4)}


def _smollm3(file: GgufFile) -> Config:
    num_layers = _num_layers(file)
    interval = 4  # every fourth layer has no rotary embedding; GGUF takes it as known
    return {
        "no_rope_layer_interval": interval,
        "no_rope_layers": [int((layer + 1) % interval != 0) for layer in range(num_layers)],
        "layer_types": ["full_attention"] * num_layers,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _layer_types(file: GgufFile, period: int) -> list[str]:
    """Which layers slide: as the file lists them, else all but the last of each `period`."""
    pattern = file.setting("attention.sliding_window_pattern", period)
    num_layers = _num_layers(file)
    slides = pattern if isinstance(pattern, list) else [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


_LLAMA = Family("LlamaForCausalLM", "llama", _LLAMA_LAYER, _nothing, bias_flags=_ALL_BIASES, interleaved_qk=True)
_MISTRAL = Family("MistralForCausalLM", "mistral", _LLAMA_LAYER, _mistral, interleaved_qk=True)
_PHI3_LAYER = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", *_PRE_NORMS)
_POST_NORM_LAYER = (*_ATTENTION, *_QK_NORMS, *_MLP, *_POST_NORMS)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    # InternLM2 is a Llama whose q, k and v were one matrix; GGUF has split it already
    "internlm2": _LLAMA,
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", _LLAMA_LAYER, _qwen, biased_modules=_ATTENTION[:3]),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", (*_LLAMA_LAYER, *_QK_NORMS), _qwen, bias_flags=_ATTENTION_BIAS),
    "gemma2": Family("Gemma2ForCausalLM", "gemma2", (*_ATTENTION, *_MLP, *_GEMMA_NORMS), _gemma2, norm_offset=1.0),
    "gemma3": Family(
        "Gemma3ForCausalLM", "gemma3_text", (*_ATTENTION, *_QK_NORMS, *_MLP, *_GEMMA_NORMS), _gemma3, norm_offset=1.0
    ),
    "phi3": Family("Phi3ForCausalLM", "phi3", _PHI3_LAYER, _phi3),
    "granite": Family(
        "GraniteForCausalLM", "granite", _LLAMA_LAYER, _granite, bias_flags=_ALL_BIASES, interleaved_qk=True
    ),
    "olmo2": Family("Olmo2ForCausalLM", "olmo2", _POST_NORM_LAYER, _olmo2, bias_flags=_ATTENTION_BIAS),
    "exaone4": Family("Exaone4ForCausalLM", "exaone4", _POST_NORM_LAYER, _exaone4),
    "smollm3": Family(
        "SmolLM3ForCausalLM", "smollm3", _LLAMA_LAYER, _smollm3, bias_flags=_ALL_BIASES, interleaved_qk=True
    ),
}
