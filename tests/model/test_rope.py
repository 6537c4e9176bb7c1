"""The tables of cosines and sines are those that transformers computes."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from llmd.model.rope import cos_sin_table
from llmd.model.rope_spec import LongRopeScaling, RopeSpec
from llmd.model.spec import parse_spec

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 128,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
TRAINED = 64
FACTORS = {"short_factor": [1.0 + i / 10 for i in range(16)], "long_factor": [1.0 + i for i in range(16)]}


def theirs(config: Any, embedding: Any, length: int) -> torch.Tensor:
    """[length, rotary_dim]: half cosines, half sines, as their module gives them for positions 0 … length - 1."""
    cos, sin = embedding(config)(torch.zeros(1), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=1)


def ours(config: Any, architecture: str, length: int) -> torch.Tensor:
    rope = parse_spec(config.to_dict() | {"architectures": [architecture]}).layers[0].rope
    assert rope is not None
    return cos_sin_table(rope, max_model_len=length, device=torch.device("cpu"))


@pytest.mark.parametrize("length", [TRAINED, 4 * TRAINED], ids=["trained length", "beyond it"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.9},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.8, "mscale_all_dim": 0.5},
        {"rope_type": "longrope", "factor": 4.0, **FACTORS},
        {"rope_type": "longrope", "factor": 4.0, "attention_factor": 1.3, **FACTORS},
    ],
    ids=lambda p: p["rope_type"],
)
def test_tables_are_those_of_transformers(parameters: dict[str, Any], length: int) -> None:
    parameters = {"rope_theta": 10000.0} | parameters
    if parameters["rope_type"] in ("llama3", "yarn", "longrope"):
        parameters["original_max_position_embeddings"] = TRAINED
    config = LlamaConfig(**SIZES, max_position_embeddings=TRAINED, rope_parameters=dict(parameters))
    expected = theirs(config, LlamaRotaryEmbedding, length)
    torch.testing.assert_close(ours(config, "LlamaForCausalLM", length), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [TRAINED, 4 * TRAINED], ids=["trained length", "beyond it"])
def test_partial_longrope_of_phi3(length: int) -> None:
    """Phi-4-mini's way: 3/4 of a head rotate, the original length stands beside the rope's own dict."""
    factors = {name: values[:12] for name, values in FACTORS.items()}
    config = Phi3Config(
        **SIZES,
        max_position_embeddings=4 * TRAINED,
        original_max_position_embeddings=TRAINED,
        partial_rotary_factor=0.75,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
        pad_token_id=0,
    )
    table = ours(config, "Phi3ForCausalLM", length)
    assert table.shape == (length, 24)
    torch.testing.assert_close(table, theirs(config, Phi3RotaryEmbedding, length), atol=1e-6, rtol=0)


def test_longrope_follows_the_served_length_alone() -> None:
    """Contract C3: one position has one rotation, however long its sequence happens to be."""
    scaling = LongRopeScaling((1.0, 1.0), (4.0, 4.0), TRAINED, 1.0)
    rope = RopeSpec(theta=100.0, rotary_dim=4, scaling=scaling)
    short, at_border, beyond = (
        cos_sin_table(rope, max_model_len=n, device=torch.device("cpu")) for n in (8, TRAINED, TRAINED + 1)
    )
    assert torch.equal(short, at_border[:8])
    assert math.isclose(float(short[4, 0]), math.cos(4.0), abs_tol=1e-6)
    assert math.isclose(float(beyond[4, 0]), math.cos(1.0), abs_tol=1e-6)
