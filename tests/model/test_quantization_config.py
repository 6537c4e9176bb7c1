"""quantization_config of published checkpoints comes out right, and what cannot be honoured is refused by name."""

from typing import Any

import pytest

from llmd.errors import UnsupportedModel
from llmd.model.quantization import ModulePattern, QuantizationSpec, WeightScheme
from llmd.model.spec import parse_spec
from tests.model.test_spec import TINY

LAYER = "model.layers.3"


def quantization(config: dict[str, Any], **model: Any) -> QuantizationSpec:
    spec = parse_spec(TINY | {"quantization_config": config} | model)
    assert spec.quantization is not None
    return spec.quantization


def compressed(weights: dict[str, Any], form: str, **fields: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}} | fields


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (
            AWQ | {"backend": "autoawq", "do_fuse": False, "modules_to_not_convert": None},
            WeightScheme(layout="awq", bits=4, block=(1, 128), symmetric=False),
        ),
        (
            {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"},
            WeightScheme(layout="awq", bits=4, block=(1, 64), symmetric=False),
        ),
        (
            GPTQ | {"damp_percent": 0.01, "true_sequential": True, "static_groups": False, "model_file_base_name": "m"},
            WeightScheme(layout="gptq", bits=4, block=(1, 128)),
        ),
        (
            GPTQ | {"bits": 8, "desc_act": True, "sym": False, "checkpoint_format": "gptq_v2"},
            WeightScheme(layout="gptq_v2", bits=8, block=(1, 128), symmetric=False, shuffled=True),
        ),
        # where all inputs are one group, their order does not matter
        (GPTQ | {"group_size": -1, "desc_act": True}, WeightScheme(layout="gptq", bits=4, block=(1, None))),
        (compressed(INT4, "pack-quantized"), WeightScheme(layout="packed", bits=4, block=(1, 128))),
        (
            compressed(INT4 | {"symmetric": False, "actorder": "group"}, "pack-quantized"),
            WeightScheme(layout="packed", bits=4, block=(1, 128), symmetric=False, shuffled=True),
        ),
        # "static" decides which inputs are quantised first, not where they lie
        (
            compressed(INT4 | {"actorder": "static"}, "pack-quantized"),
            WeightScheme(layout="packed", bits=4, block=(1, 128)),
        ),
        (
            compressed({"num_bits": 8, "type": "int", "strategy": "channel"}, "int-quantized"),
            WeightScheme(layout="int8", bits=8, block=(1, None)),
        ),
        (compressed(FP8, "float-quantized"), WeightScheme(layout="float8", bits=8, block=(1, None))),
        (
            compressed(FP8 | {"strategy": "tensor"}, "naive-quantized"),
            WeightScheme(layout="float8", bits=8, block=(None, None)),
        ),
        (
            compressed(FP8 | {"strategy": "block", "block_structure": [128, 128]}, "float-quantized"),
            WeightScheme(layout="float8", bits=8, block=(128, 128)),
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
            WeightScheme(layout="float8", bits=8, block=(128, 128)),
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            WeightScheme(layout="float8", bits=8, block=(None, None)),
        ),
        ({"quant_method": "fbgemm_fp8"}, WeightScheme(layout="float8", bits=8, block=(1, None))),
    ],
)
def test_published_configs(config: dict[str, Any], scheme: WeightScheme) -> None:
    spec = quantization(config)
    assert spec.scheme(f"{LAYER}.mlp.down_proj") == scheme
    assert spec.schemes() == (scheme,)


def test_a_model_without_is_not_quantized() -> None:
    assert parse_spec(TINY).quantization is None
    assert parse_spec(TINY | {"quantization_config": None}).quantization is None


def test_the_field_of_old_compressed_tensors() -> None:
    spec = parse_spec(TINY | {"compression_config": compressed(INT4, "pack-quantized")})
    assert spec.quantization is not None
    assert spec.quantization.method == "compressed-tensors"


def converted(spec: QuantizationSpec, *modules: str) -> list[bool]:
    return [spec.scheme(module) is not None for module in modules]


def test_modules_that_are_not_converted() -> None:
    modules = ("lm_head", f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.gate", f"{LAYER}.self_attn.o_proj")
    assert converted(quantization(AWQ), *modules) == [False, True, False, True]
    listed = AWQ | {"modules_to_not_convert": ["self_attn.o_proj", "model.layers.33"]}
    assert converted(quantization(listed), *modules) == [False, True, False, False]
    fp8 = {"quant_method": "fp8", "ignored_layers": [f"{LAYER}.mlp"]}
    assert converted(quantization(fp8), *modules) == [False, False, False, True]
    # compressed-tensors takes what is not on its list
    ignored = compressed(INT4, "pack-quantized", ignore=["re:.*mlp.gate$", "re:.*o_proj"])
    assert converted(quantization(ignored), *modules) == [True, True, False, False]


def test_gptq_says_what_it_converts() -> None:
    modules = ("lm_head", f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.up_proj")
    assert converted(quantization(GPTQ), *modules) == [False, True, True]
    assert converted(quantization(GPTQ | {"lm_head": True}), *modules) == [True, True, True]
    listed = GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.o_proj"], ["self_attn.k_proj"]]}
    assert converted(quantization(listed), *modules) == [False, True, False]


def test_gptq_with_other_fields_for_some_modules() -> None:
    dynamic = {"-:.*o_proj": {}, r"+:.*layers\.3\.mlp": {"bits": 8, "group_size": 64}, ".*layers.4.*": {"sym": False}}
    spec = quantization(GPTQ | {"dynamic": dynamic})
    assert spec.scheme(f"{LAYER}.self_attn.o_proj") is None
    assert spec.scheme(f"{LAYER}.mlp.up_proj") == WeightScheme(layout="gptq", bits=8, block=(1, 64))
    assert spec.scheme("model.layers.4.mlp.up_proj") == WeightScheme(
        layout="gptq", bits=4, block=(1, 128), symmetric=False
    )
    assert spec.scheme("model.layers.5.mlp.up_proj") == WeightScheme(layout="gptq", bits=4, block=(1, 128))
    assert spec.longest_group() == 128


def test_compressed_tensors_with_several_groups() -> None:
    groups = {
        "group_0": {"targets": ["re:.*self_attn.*"], "weights": FP8, "format": "float-quantized"},
        "group_1": {"targets": [f"{LAYER}.mlp.up_proj"], "weights": INT4, "format": "pack-quantized"},
    }
    spec = quantization({"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups})
    layouts = [spec.scheme(f"{LAYER}.{name}") for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
    assert [scheme and scheme.layout for scheme in layouts] == ["float8", "packed", None]


def test_names_of_multimodal_checkpoints() -> None:
    """Modules are listed as the checkpoint calls them, and called otherwise here."""
    text = {**TINY, "query_pre_attn_scalar": 16, "head_dim": 16, "sliding_window_pattern": 2}
    config = compressed(INT4, "pack-quantized", ignore=["re:language_model.model.layers.0.*", "language_model.lm_head"])
    spec = parse_spec(
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "quantization_config": config}
        | {"tie_word_embeddings": False}
    )
    assert spec.quantization is not None
    modules = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head")
    assert converted(spec.quantization, *modules) == [False, True, False]


@pytest.mark.parametrize(
    ("pattern", "module", "matches"),
    [
        ("lm_head", "lm_head", True),
        ("gate", "model.layers.0.mlp.gate", True),
        ("gate", "model.layers.0.mlp.gate_proj", False),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        ("mlp.gate.", "model.layers.1.mlp.gate", True),
        ("re:.*mlp", "model.layers.1.mlp.up_proj", True),
        ("re:mlp", "model.layers.1.mlp.up_proj", False),
    ],
)
def test_patterns_of_modules(pattern: str, module: str, matches: bool) -> None:
    assert ModulePattern(pattern).matches(module) == matches


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "`quant_method` 'bitsandbytes'.*supported: awq, gptq"),
        ({"load_in_8bit": True}, "`quant_method` None"),
        ([], r"`quantization_config`.*an object, not \[\]"),
        (AWQ | {"version": "gemv"}, "`version` 'gemv'.*supported: gemm"),
        (AWQ | {"backend": "llm-awq"}, "`backend` 'llm-awq'"),
        (AWQ | {"bits": 3}, "`bits` 3"),
        (AWQ | {"group_size": 100}, "`group_size` 100"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "`modules_to_not_convert`.*'lm_head'"),
        (GPTQ | {"bits": 2}, "`bits` 2.*supported: 4, 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "`checkpoint_format` 'marlin'"),
        (GPTQ | {"is_marlin_format": True}, "`is_marlin_format`"),
        (GPTQ | {"dynamic": {"+:(": {}}}, r"regular expression 're:\('"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 3}}}, "`bits` 3"),
        (GPTQ | {"desc_act": "yes"}, "`desc_act`.*true or false"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "`fmt` 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "`weight_block_size`.*128"),
        ({"quant_method": "fp8", "modules_to_convert": ["embed_tokens"]}, "`modules_to_convert`"),
        (compressed(INT4, "nvfp4-pack-quantized"), "`format` 'nvfp4-pack-quantized'"),
        (compressed(INT4 | {"num_bits": 3}, "pack-quantized"), "group_0.weights.*`num_bits` 3"),
        (compressed(FP8, "pack-quantized"), "`type` 'float' with `num_bits` 8.*'pack-quantized'"),
        (compressed(INT4, "int-quantized"), "`type` 'int' with `num_bits` 4.*'int-quantized'"),
        (compressed(FP8 | {"symmetric": False}, "float-quantized"), "`symmetric` false"),
        (compressed(FP8 | {"strategy": "tensor_group"}, "float-quantized"), "`strategy` 'tensor_group'"),
        (compressed(INT4, "pack-quantized", quantization_status="frozen"), "`quantization_status` 'frozen'"),
        (compressed(INT4, "pack-quantized", sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (compressed(INT4, "pack-quantized", transform_config={"config_groups": {}}), "`transform_config`"),
        (compressed(INT4, "pack-quantized", config_groups={}), "`config_groups`"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_field_and_value(config: Any, named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        parse_spec(TINY | {"quantization_config": config})


def test_what_concerns_activations_and_caches_is_accepted() -> None:
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": FP8, "input_activations": activations}
    cache = {"targets": ["LlamaAttention"], "weights": None, "output_activations": activations}
    groups = {"group_0": group, "group_1": cache}
    config = compressed(FP8, "float-quantized", config_groups=groups, kv_cache_scheme=activations)
    assert quantization(config).scheme(LAYER) == WeightScheme(layout="float8", bits=8, block=(1, None))
