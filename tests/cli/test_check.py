"""`llmd check`: what would happen, without serving."""

import json
import shutil
from pathlib import Path

import pytest

from llmd.cli import main


def test_it_prints_what_serve_would_do(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tiny_model_dir), "--max-model-len", "256", "--max-num-seqs", "2"]) == 0
    printed = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in printed.splitlines() if not line.startswith(" "))
    assert rows["family"] == "LlamaForCausalLM"
    assert "context 256 tokens" in rows["memory"]
    assert "2 sequences" in rows["batch"]
    # the template's own words around a message
    assert json.loads(rows["template"].partition("becomes ")[2]).startswith("<|im_start|>user\nHello")


def test_what_would_stop_serve_stops_it(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tiny_model_dir), "--max-model-len", "100000"]) == 1
    assert "--max-model-len 100000 is more than the model allows: 512" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 12, "num_experts_per_tok": 3, "head_dim": 16}
            | {"moe_intermediate_size": 32, "mlp_only_layers": [0]},
            ["4 heads over 2 KV heads of 16", "1 with 12 experts, 3 a token"],
        ),
        (
            {"architectures": ["DeepseekV2ForCausalLM"], "num_key_value_heads": 4, "num_experts_per_tok": 6}
            | {"q_lora_rank": None, "moe_intermediate_size": 32},
            ["4 heads over 4 KV heads of 192 (expanded from latents)", "2 with 64 experts, 6 a token"],
        ),
    ],
    ids=["experts", "latent attention"],
)
def test_it_says_what_takes_memory_in_models_with_experts(
    config: dict[str, object],
    words: list[str],
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    sizes = {
        "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes | config))
    assert main(["check", str(folder), "--max-num-seqs", "2"]) == 0
    layers = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("layers"))
    for word in words:
        assert word in layers


def test_it_says_how_a_model_is_quantized_and_what_it_takes(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in tiny_model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["check", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "quantised    awq, 4 bits, groups of 32 inputs (awq)" in printed
    assert "dequantised at load" in printed
    assert main(["check", str(tmp_path), "--device", "cuda"]) == 0
    assert "products read the weights as they are" in capsys.readouterr().out


def test_it_says_that_experts_are_mxfp4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", "gpt-oss-20b", "--load-format", "dummy", "--download-dir", str(tmp_path), "--max-num-seqs", "2"]
    assert main([*command, "--device", "cuda"]) == 0
    printed = capsys.readouterr().out
    assert "quantised    experts alone: mxfp4, 4 bits, groups of 32 inputs" in printed
    assert "products read the weights as they are" in printed
