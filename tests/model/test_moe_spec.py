"""config.json → experts, routing and latent attention, as published models have them; the rest is refused by name."""

import math
from typing import Any

import pytest

from llmd.errors import UnsupportedModel
from llmd.model.memory import activation_bytes, kv_bytes_per_token, weight_bytes
from llmd.model.moe_spec import MoeSpec
from llmd.model.parallel import Rank
from llmd.model.rope_spec import YarnScaling
from llmd.model.spec import LatentSpec, parse_spec
from tests.model.published_configs import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GPT_OSS_20B,
    MIXTRAL_8X7B,
    QWEN1_5_MOE,
    QWEN3_30B_A3B,
    TINY,
)


def moe_of(config: dict[str, Any], layer: int = -1) -> MoeSpec:
    moe = parse_spec(config).layers[layer].moe
    assert moe is not None
    return moe


def test_published_experts() -> None:
    mixtral = moe_of(MIXTRAL_8X7B)
    assert (mixtral.num_experts, mixtral.num_chosen, mixtral.expert_size) == (8, 2, 14336)
    assert (mixtral.scoring, mixtral.renormalize, mixtral.shared_size) == ("softmax", True, 0)
    assert moe_of(QWEN3_30B_A3B).renormalize
    qwen2 = moe_of(QWEN1_5_MOE)
    assert (qwen2.renormalize, qwen2.shared_size, qwen2.shared_gate) == (False, 5632, True)
    gpt_oss = moe_of(GPT_OSS_20B)
    assert (gpt_oss.activation, gpt_oss.expert_bias, gpt_oss.router_bias) == ("clamped_silu", True, True)
    assert gpt_oss.mxfp4
    assert not moe_of({name: GPT_OSS_20B[name] for name in GPT_OSS_20B if name != "quantization_config"}).mxfp4
    lite, v3 = moe_of(DEEPSEEK_V2_LITE), moe_of(DEEPSEEK_V3)
    assert (lite.scoring, lite.num_groups, lite.shared_size, lite.choice_bias) == ("softmax", 1, 2816, False)
    assert (v3.scoring, v3.num_groups, v3.num_chosen_groups, v3.group_score) == ("sigmoid", 8, 4, "top2")
    assert (v3.scale, v3.renormalize, v3.choice_bias, v3.router_in_float32) == (2.5, True, True, True)
    groups = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
    v2 = moe_of(DEEPSEEK_V2_LITE | groups)
    assert (v2.num_groups, v2.num_chosen_groups, v2.group_score, v2.scale) == (8, 3, "max", 16.0)


def test_some_layers_have_no_experts() -> None:
    def sparse(config: dict[str, Any]) -> list[int]:
        return [index for index, layer in enumerate(parse_spec(config).layers) if layer.moe]

    qwen3 = QWEN3_30B_A3B | {"num_hidden_layers": 6}
    assert sparse(qwen3) == [0, 1, 2, 3, 4, 5]
    assert sparse(qwen3 | {"decoder_sparse_step": 2}) == [1, 3, 5]
    assert sparse(qwen3 | {"mlp_only_layers": [0, 4]}) == [1, 2, 3, 5]
    assert sparse(DEEPSEEK_V3) == list(range(3, 61))


def test_windows_of_families_with_experts() -> None:
    def windows(config: dict[str, Any]) -> list[int | None]:
        return [layer.window for layer in parse_spec(config | {"num_hidden_layers": 4}).layers]

    switched = {"use_sliding_window": True, "sliding_window": 64}
    without_types = {name: value for name, value in GPT_OSS_20B.items() if name != "layer_types"}
    assert windows(without_types) == [128, None, 128, None]
    assert windows(QWEN1_5_MOE) == [None] * 4
    assert windows(QWEN1_5_MOE | switched | {"max_window_layers": 2}) == [64, None, None, None]
    assert windows(QWEN3_30B_A3B | switched) == [64] * 4
    assert windows(MIXTRAL_8X7B | {"sliding_window": 64}) == [64] * 4


def test_gpt_oss_rotates_as_yarn_says_and_as_it_is_without_words() -> None:
    rope = parse_spec(GPT_OSS_20B).layers[0].rope
    assert rope is not None
    assert isinstance(rope.scaling, YarnScaling)
    assert (rope.theta, rope.scaling.truncate, rope.scaling.factor) == (150000.0, False, 32.0)
    silent = {name: value for name, value in GPT_OSS_20B.items() if not name.startswith("rope_")}
    assert parse_spec(silent) == parse_spec(GPT_OSS_20B)
    assert parse_spec(GPT_OSS_20B).sinks


def test_latent_attention_takes_memory_for_expanded_heads() -> None:
    spec = parse_spec(DEEPSEEK_V2_LITE)
    assert (spec.head_dim, spec.num_kv_heads, spec.rope_interleaved) == (192, 16, True)
    assert spec.latent == LatentSpec(q_rank=None, kv_rank=512, rope_dim=64, nope_dim=128, v_dim=128)
    assert kv_bytes_per_token(spec, dtype_bytes=2) == 324 << 10
    assert kv_bytes_per_token(parse_spec(DEEPSEEK_V3), dtype_bytes=2) == 2 * 61 * 128 * 192 * 2
    # of the trained length alone there is no temperature
    temperature = 0.1 * 0.707 * math.log(40) + 1
    assert math.isclose(spec.attention_scale, 192**-0.5 * temperature**2)
    assert math.isclose(parse_spec(DEEPSEEK_V2_LITE | {"rope_scaling": None}).attention_scale, 192**-0.5)
    wide = parse_spec(DEEPSEEK_V2_LITE | {"v_head_dim": 256})
    assert (wide.head_dim, wide.layers[0].rope.rotary_dim if wide.layers[0].rope else 0) == (256, 64)


def test_memory_of_experts() -> None:
    spec = parse_spec(DEEPSEEK_V3)
    # routers and their biases are float32
    extra = 2 * 58 * (256 * 7168 + 256)
    assert weight_bytes(spec, dtype_bytes=2) == 2 * 671_026_419_200 + extra
    per_token = activation_bytes(spec, max_num_tokens=1, max_num_logits=0, dtype_bytes=2)
    # eight experts with a gate, an up and their product each, and the one that everybody has
    assert per_token > 9 * 3 * 2048 * 2
    mixtral = parse_spec(MIXTRAL_8X7B)
    whole = weight_bytes(mixtral, dtype_bytes=2)
    both = [weight_bytes(mixtral, dtype_bytes=2, rank=Rank(index, 2)) for index in (0, 1)]
    assert both[0] == both[1]
    # what all ranks have: norms and routers
    assert sum(both) - whole == 2 * (65 * 4096 + 32 * 8 * 4096)


@pytest.mark.parametrize(
    ("config", "change", "named"),
    [
        (MIXTRAL_8X7B, {"norm_topk_prob": False}, "norm_topk_prob"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        (MIXTRAL_8X7B, {"num_local_experts": 0}, "0 experts"),
        (MIXTRAL_8X7B, {"num_local_experts": "8"}, "num_local_experts"),
        (MIXTRAL_8X7B, {"num_experts": 16}, "one number of experts"),
        (MIXTRAL_8X7B, {"moe_intermediate_size": 64}, "moe_intermediate_size"),
        (MIXTRAL_8X7B, {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        (MIXTRAL_8X7B, {"n_shared_experts": 1}, "n_shared_experts"),
        (MIXTRAL_8X7B, {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
        (QWEN3_30B_A3B, {"mlp_only_layers": "none"}, "mlp_only_layers"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (QWEN3_30B_A3B, {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
        (QWEN3_30B_A3B, {"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
        (GPT_OSS_20B, {"swiglu_limit": 10.0}, "swiglu_limit"),
        (GPT_OSS_20B, {"swiglu_alpha": 1.0}, "swiglu_alpha"),
        (GPT_OSS_20B, {"hidden_act": "gelu"}, "hidden_act"),
        (GPT_OSS_20B, {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        (DEEPSEEK_V2_LITE, {"topk_method": "noaux_tc"}, "topk_method.*only 'greedy' or 'group_limited_greedy'"),
        (DEEPSEEK_V2_LITE, {"scoring_func": "sigmoid"}, "scoring_func"),
        (DEEPSEEK_V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob"),
        (DEEPSEEK_V2_LITE, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (DEEPSEEK_V2_LITE, {"num_key_value_heads": 4}, "latent attention"),
        (DEEPSEEK_V2_LITE, {"mlp_bias": True}, "mlp_bias"),
        (DEEPSEEK_V2_LITE, {"rope_interleave": False}, "rope_interleave"),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method"),
        (QWEN3_30B_A3B, {"num_experts": None}, "one number of experts"),
        (DEEPSEEK_V3, {"n_group": 7}, "7 groups"),
        (DEEPSEEK_V3, {"topk_group": 9}, "9 of 8 groups"),
        (DEEPSEEK_V3, {"n_group": 256, "topk_group": 8}, "n_group"),
        (TINY, {"kv_lora_rank": 512}, "kv_lora_rank"),
        (TINY, {"n_routed_experts": 8}, "n_routed_experts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) < 3 else "",
)
def test_experts_and_latents_that_cannot_be_honoured_are_refused(
    config: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        parse_spec(config | change)
