"""Every family computes what transformers computes: at once, in chunks, token by token."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmd.model.checkpoint import load_decoder
from llmd.model.decoder import Decoder
from tests.model.paged_steps import PagedSequences, logits_in_chunks, logits_in_one_step
from tests.model.reference_models import (
    CASES,
    VOCAB_SIZE,
    make_multimodal_gemma3,
    make_reference,
    reference_logits,
    save_reference,
)

TOLERANCE = 1e-4
LONGEST = 40
# Their factors follow each call's longest position in transformers, and the served length here (contract C3)
LENGTH_DEPENDENT = {"llama, dynamic rope", "internlm3, dynamic rope", "phi3, longrope, long"}
WITH_EXPERTS = ["mixtral", "qwen2 moe", "qwen3 moe", "gpt-oss", "deepseek v2, groups, yarn, biases", "deepseek v3"]
ARCHITECTURES = {"internlm3": "InternLM3ForCausalLM"}  # transformers writes that it runs it as a Llama


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (LONGEST, 19, 3)]


def decoder_of(folder: Path) -> Decoder:
    # served no longer than the longest sequence: transformers picks its factors by that (dynamic NTK)
    return load_decoder(folder, dtype=torch.float32, device=torch.device("cpu"), max_model_len=LONGEST)


def assert_close(logits: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(logits, expected, strict=True):
        assert theirs.std() > 0.1, "logits so small that they prove nothing"
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, sequences: list[list[int]], tmp_path: Path) -> None:
    model_type, fields = CASES[case]
    model = make_reference(model_type, fields)
    changes = {"architectures": [ARCHITECTURES[model_type]]} if model_type in ARCHITECTURES else {}
    decoder = decoder_of(save_reference(model, tmp_path, **changes))
    if case in LENGTH_DEPENDENT:
        sequences = sequences[:1]
    expected = reference_logits(model, sequences)
    assert_close(logits_in_one_step(decoder, sequences), expected)
    assert_close(logits_in_chunks(decoder, sequences, [13, 5, 9, 1]), expected)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("case", WITH_EXPERTS)
def test_experts_are_chosen_as_in_transformers(
    case: str, seed: int, sequences: list[list[int]], tmp_path: Path
) -> None:
    """One token that goes to another expert than there shows in its logits; other weights, other choices."""
    model_type, fields = CASES[case]
    model = make_reference(model_type, fields, seed=seed)
    decoder = decoder_of(save_reference(model, tmp_path))
    assert_close(logits_in_chunks(decoder, sequences, [1, 17, 4]), reference_logits(model, sequences))


def test_the_layer_that_predicts_a_second_token_is_left_out(sequences: list[list[int]], tmp_path: Path) -> None:
    """DeepSeek V3's checkpoints have it behind the last of the layers that config.json counts."""
    model = make_reference(*CASES["deepseek v3"])
    folder = save_reference(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.4.eh_proj.weight"] = torch.ones(48, 96)
    tensors["model.layers.4.mlp.gate.weight"] = torch.ones(8, 48)
    save_file(tensors, folder / "model.safetensors")
    assert_close(logits_in_one_step(decoder_of(folder), sequences), reference_logits(model, sequences))


def test_multimodal_gemma3_serves_its_text_model(sequences: list[list[int]], tmp_path: Path) -> None:
    model = make_multimodal_gemma3()
    decoder = decoder_of(save_reference(model, tmp_path))
    assert_close(logits_in_one_step(decoder, sequences), reference_logits(model, sequences))


INTERNLM2_NAMES = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def test_internlm2_is_a_llama_with_grouped_projections(sequences: list[list[int]], tmp_path: Path) -> None:
    """transformers has no InternLM2; its numbers are those of a Llama whose q, k and v are kept by KV head."""
    model = make_reference("llama", {"attention_bias": True})
    folder = save_reference(
        model, tmp_path, architectures=["InternLM2ForCausalLM"], attention_bias=None, mlp_bias=None, bias=True
    )
    tensors = load_file(folder / "model.safetensors")
    num_kv_heads, group, head_dim = 2, 3, 8
    for layer in range(4):
        for kind in ("weight", "bias"):
            q, k, v = (tensors.pop(f"model.layers.{layer}.self_attn.{name}_proj.{kind}") for name in "qkv")
            heads = [
                q.view(num_kv_heads, group, head_dim, *q.shape[1:]),
                k.view(num_kv_heads, 1, head_dim, *k.shape[1:]),
                v.view(num_kv_heads, 1, head_dim, *v.shape[1:]),
            ]
            grouped = torch.cat(heads, dim=1).flatten(0, 2).contiguous()
            tensors[f"model.layers.{layer}.attention.wqkv.{kind}"] = grouped
    for old, new in INTERNLM2_NAMES.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    assert_close(logits_in_one_step(decoder_of(folder), sequences), reference_logits(model, sequences))


def test_configs_of_transformers_4_give_the_same_model(sequences: list[list[int]], tmp_path: Path) -> None:
    """The same weights under `rope_theta`, `rope_scaling` and `torch_dtype`."""
    model_type, fields = CASES["llama, llama3 rope"]
    model = make_reference(model_type, fields)
    folder = save_reference(model, tmp_path)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    parameters = config.pop("rope_parameters")
    config |= {
        "rope_theta": parameters.pop("rope_theta"),
        "rope_scaling": parameters,
        "torch_dtype": config.pop("dtype"),
    }
    file.write_text(json.dumps(config))
    assert_close(logits_in_one_step(decoder_of(folder), sequences), reference_logits(model, sequences))


@pytest.mark.parametrize("case", ["llama", "gemma3", "olmo2"])
def test_bfloat16_is_the_same_model_rounded(case: str, sequences: list[list[int]], tmp_path: Path) -> None:
    folder = save_reference(make_reference(*CASES[case]), tmp_path)
    rounded = load_decoder(folder, dtype=torch.bfloat16, device=torch.device("cpu"), max_model_len=LONGEST)
    (exact,) = logits_in_one_step(decoder_of(folder), sequences[:1])
    (ours,) = logits_in_one_step(rounded, sequences[:1])
    assert ours.dtype == torch.float32
    # 8 bits of mantissa through four layers
    assert (ours - exact).norm() < 0.05 * exact.norm()


def test_logits_of_chosen_rows_only(sequences: list[list[int]], tmp_path: Path) -> None:
    """`logit_rows` may name any rows, none too."""
    decoder = decoder_of(save_reference(make_reference("llama", {}), tmp_path))
    run = PagedSequences(decoder, num_seqs=1, max_len=LONGEST)
    inputs = run.inputs({0: sequences[0]})
    everything = decoder.forward(inputs, run.kv)
    last = decoder.forward(replace(inputs, logit_rows=torch.tensor([LONGEST - 1])), run.kv)
    nothing = decoder.forward(replace(inputs, logit_rows=torch.tensor([], dtype=torch.int64)), run.kv)
    torch.testing.assert_close(last[0], everything[-1])
    assert nothing.shape == (0, VOCAB_SIZE)
