"""Random weights instead of a checkpoint's."""

from pathlib import Path

import pytest
import torch

from llmd.model.checkpoint import load_decoder
from llmd.model.dummy import dummy_parameters
from llmd.model.parallel import Rank
from llmd.model.parameters import parameters
from llmd.model.spec import load_spec, parse_spec
from tests.model.paged_steps import logits_in_one_step
from tests.model.reference_models import CASES, make_reference, save_reference


def test_a_model_without_weights_computes_the_same_finite_logits_each_time(tiny_model_dir: Path) -> None:
    token_ids = list(range(40))
    logits = [
        logits_in_one_step(
            load_decoder(tiny_model_dir, dtype=torch.float32, device=torch.device("cpu"), dummy=True), [token_ids]
        )[0]
        for _ in range(2)
    ]
    assert torch.equal(logits[0], logits[1])
    # neither exploding nor dying out
    assert 0.1 < logits[0].std() < 10


@pytest.mark.parametrize("case", ["gpt-oss", "deepseek v3"])
def test_experts_without_weights(case: str, tmp_path: Path) -> None:
    folder = save_reference(make_reference(*CASES[case]), tmp_path)
    (folder / "model.safetensors").unlink()
    decoder = load_decoder(folder, dtype=torch.bfloat16, device=torch.device("cpu"), max_model_len=40, dummy=True)
    (logits,) = logits_in_one_step(decoder, [list(range(40))])
    assert 0.1 < logits.std() < 10


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_change_nothing(offset: float, tiny_model_dir: Path) -> None:
    weights = dummy_parameters(
        parameters(load_spec(tiny_model_dir)),
        norm_weight_offset=offset,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        rank=Rank(),
        progress=lambda _done, _total: None,
    )
    assert torch.all(weights["layers.1.mlp_norm"] + offset == 1)
    assert weights["embedding"].dtype == torch.bfloat16
    assert weights["embedding"].unique().numel() > 1000


def test_progress_goes_from_nothing_to_all_and_ranks_get_their_part() -> None:
    spec = parse_spec(
        {
            "architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        }
    )  # fmt: skip
    heard: list[tuple[int, int]] = []
    half = dummy_parameters(
        parameters(spec),
        norm_weight_offset=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        rank=Rank(1, 2),
        progress=lambda done, total: heard.append((done, total)),
    )
    assert half["layers.0.gate_up.weight"].shape == (128, 64)
    total = sum(weight.nbytes for weight in half.values())
    assert heard[0] == (0, total)
    assert heard[-1] == (total, total)
