"""config.json → ModelSpec: published configs come out right, and what cannot be honoured is refused by name."""

import json
import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest

from llmd.errors import UnsupportedModel
from llmd.model.memory import activation_bytes, kv_bytes_per_token, num_parameters, rope_bytes, weight_bytes
from llmd.model.parallel import Rank
from llmd.model.rope_spec import DynamicNtkScaling, LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling
from llmd.model.spec import load_spec, parse_spec
from tests.model.published_configs import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GEMMA_2_2B,
    GEMMA_3_270M,
    GPT_OSS_20B,
    LLAMA_3_2_1B,
    MISTRAL_7B,
    MIXTRAL_8X7B,
    PHI_4_MINI,
    QWEN1_5_MOE,
    QWEN2_5_0_5B,
    QWEN3_30B_A3B,
    SMOLLM2,
    TINY,
    sizes,
)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (SMOLLM2, 134_515_008),
        (LLAMA_3_2_1B, 1_235_814_400),
        (MISTRAL_7B, 7_241_732_096),
        (QWEN2_5_0_5B, 494_032_768),
        (GEMMA_2_2B, 2_614_341_888),
        (GEMMA_3_270M, 268_098_176),
        (PHI_4_MINI, 3_836_021_760),
        (MIXTRAL_8X7B, 46_702_792_704),
        (QWEN1_5_MOE, 14_315_784_192),
        (QWEN3_30B_A3B, 30_532_122_624),
        (GPT_OSS_20B, 20_914_757_184),
        (DEEPSEEK_V2_LITE, 15_706_484_224),
        (DEEPSEEK_V3, 671_026_419_200),
    ],
    ids=lambda value: value["architectures"][0] if isinstance(value, dict) else "",
)
def test_number_of_parameters_is_the_published_one(config: dict[str, Any], count: int) -> None:
    assert num_parameters(parse_spec(config)) == count


def test_memory_of_smollm2() -> None:
    spec = parse_spec(SMOLLM2)
    assert weight_bytes(spec, dtype_bytes=2) == 269_030_016
    assert kv_bytes_per_token(spec, dtype_bytes=4) == 2 * 30 * 3 * 64 * 4
    assert rope_bytes(spec, max_model_len=8192) == 8192 * 64 * 4
    # two ranks: one and two of three KV heads
    per_rank = [kv_bytes_per_token(spec, dtype_bytes=4, rank=Rank(index, 2)) for index in (0, 1)]
    assert per_rank == [2 * 30 * 1 * 64 * 4, 2 * 30 * 2 * 64 * 4]
    small = activation_bytes(spec, max_num_tokens=128, max_num_logits=1, dtype_bytes=4)
    assert (
        128 * 4 * (576 + 3 * 1536) < small < activation_bytes(spec, max_num_tokens=512, max_num_logits=1, dtype_bytes=4)
    )


def test_published_ropes() -> None:
    def scaling(config: dict[str, Any]) -> Any:
        rope = parse_spec(config).layers[-1].rope
        assert rope is not None
        return rope.scaling

    assert scaling(SMOLLM2) is None
    assert scaling(LLAMA_3_2_1B) == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    longrope = scaling(PHI_4_MINI)
    assert isinstance(longrope, LongRopeScaling)
    assert (longrope.trained_positions, round(longrope.attention_factor, 6)) == (4096, 1.190238)
    internlm3 = {
        "architectures": ["InternLM3ForCausalLM"], **sizes(4096, 10240, 48, 32, 2, 128512), "qkv_bias": False,
        "bias": False, "max_position_embeddings": 32768, "rope_theta": 5e7, "head_dim": 128,
        "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
    }  # fmt: skip
    assert scaling(internlm3) == DynamicNtkScaling(6.0, 32768)
    spec = parse_spec(internlm3)
    assert (spec.max_positions, spec.max_stretched_positions) == (32768, 196608)


def test_yarn_added_to_a_config_stretches_the_context() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    spec = parse_spec(QWEN2_5_0_5B | {"rope_scaling": yarn})
    assert spec.max_positions == 131072
    assert all(layer.rope and isinstance(layer.rope.scaling, YarnScaling) for layer in spec.layers)


def test_gemma_3_has_local_and_global_layers() -> None:
    spec = parse_spec(GEMMA_3_270M)
    assert [layer.window for layer in spec.layers] == ([512] * 5 + [None]) * 3
    assert {layer.rope.theta for layer in spec.layers if layer.rope and layer.window} == {10000.0}
    assert {layer.rope.theta for layer in spec.layers if layer.rope and not layer.window} == {1000000.0}
    nested = {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    }
    old = {name for name in GEMMA_3_270M if not name.startswith("rope_")}
    assert parse_spec({name: GEMMA_3_270M[name] for name in old} | nested) == spec


def test_text_config_of_a_multimodal_gemma_3_may_leave_out_much() -> None:
    spec = parse_spec(
        {
            "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "vision_config": {},
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
        }
    )  # fmt: skip
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (8, 4, 256, 262208)
    assert spec.eos_token_ids == (1, 106)
    local, full = spec.layers[0].rope, spec.layers[5].rope
    assert local is not None
    assert full is not None
    assert (local.scaling, full.scaling) == (None, LinearScaling(8.0))


def test_exaone_4_rotates_only_where_there_is_a_window() -> None:
    config = {"architectures": ["Exaone4ForCausalLM"], **sizes(64, 128, 8, 4, 2, 256)}
    hybrid = parse_spec(config | {"sliding_window": 4096, "sliding_window_pattern": "LLLG"})
    assert [layer.window for layer in hybrid.layers] == [4096, 4096, 4096, None] * 2
    assert [layer.rope is None for layer in hybrid.layers] == [False, False, False, True] * 2
    full = parse_spec(config | {"sliding_window": None, "sliding_window_pattern": None})
    assert all(layer.window is None and layer.rope is not None for layer in full.layers)


def test_smollm3_has_layers_without_positions() -> None:
    config = {"architectures": ["SmolLM3ForCausalLM"], **sizes(64, 128, 8, 4, 2, 256), "use_sliding_window": False}
    assert [layer.rope is None for layer in parse_spec(config).layers] == [False, False, False, True] * 2


def test_qwen2_has_windows_only_if_switched_on() -> None:
    config = {"architectures": ["Qwen2ForCausalLM"], **sizes(64, 128, 4, 4, 2, 256), "sliding_window": 8}
    switched = parse_spec(config | {"use_sliding_window": True, "max_window_layers": 3})
    assert [layer.window for layer in parse_spec(config).layers] == [None] * 4
    assert [layer.window for layer in switched.layers] == [None, None, None, 8]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["RwkvForCausalLM"]}, "RwkvForCausalLM"),
        ({"architectures": None}, "architectures"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"rope_scaling": {"type": "xpos", "factor": 2.0}}, "xpos"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 3]}}, "mrope_section"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}}, "short_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"embedding_multiplier": 12}, "embedding_multiplier"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_act": "relu2"}, "relu2"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "KV heads"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"bias": True}, "bias"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window"),
        ({"architectures": ["Exaone4ForCausalLM"], "sliding_window_pattern": "LXG"}, "sliding_window_pattern"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_honoured_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        parse_spec(TINY | change)


def test_neutral_values_of_foreign_fields_are_fine() -> None:
    plain = parse_spec(TINY)
    foreign = {"quantization_config": None, "num_experts": 0, "sliding_window": None, "residual_multiplier": 1.0}
    assert parse_spec(TINY | foreign) == plain


def test_dtype_is_read_in_both_conventions() -> None:
    assert parse_spec(TINY | {"torch_dtype": "bfloat16"}).dtype == "bfloat16"
    assert parse_spec(TINY | {"dtype": "float16"}).dtype == "float16"
    assert parse_spec(TINY).dtype == "float32"


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_an_unreadable_config_is_refused_with_its_path(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        load_spec(tmp_path)


def test_spec_and_memory_import_no_torch() -> None:
    """`llmd check` and the server read specs, and may not pay for torch."""
    code = """
import json, sys
import llmd.model.memory
from llmd.model.spec import parse_spec
parse_spec(json.loads(sys.argv[1]))
sys.exit("torch" in sys.modules)
"""
    assert run([sys.executable, "-c", code, json.dumps(TINY)], check=False).returncode == 0
