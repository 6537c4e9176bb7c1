"""`--load-format dummy`: folders without weights, with a tokenizer whose every token shows."""

from pathlib import Path

import pytest

from llmd.errors import StartupFailed
from llmd.fetch import fetch
from llmd.fetch.built_in import BUILT_IN
from llmd.fetch.source import find_ready
from llmd.model.memory import num_parameters
from llmd.model.spec import load_spec, parse_spec
from llmd.text.chat_template import ChatTemplate
from llmd.text.tokenizer import Tokenizer

# as their makers count them, in thousand millions
SIZES = {
    "llama-3.2-1b": 1.236, "llama-3.1-8b": 8.030, "llama-3.1-70b": 70.554, "mistral-7b": 7.248, "qwen3-0.6b": 0.596,
    "qwen3-8b": 8.191, "smollm2-135m": 0.1345, "deepseek-v2-lite": 15.706, "gpt-oss-20b": 20.915,
    "gpt-oss-120b": 116.83, "mixtral-8x7b": 46.703, "qwen3-30b-a3b": 30.532,
}  # fmt: skip


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_configurations_have_the_sizes_of_their_models(name: str) -> None:
    assert num_parameters(parse_spec(BUILT_IN[name])) / 1e9 == pytest.approx(SIZES[name], rel=0.001)


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_has_a_folder_that_can_be_served(name: str, tmp_path: Path) -> None:
    folder = fetch(name, revision=None, cache_dir=tmp_path, dummy=True)
    spec, tokenizer = load_spec(folder), Tokenizer.load(folder)
    assert spec == parse_spec(BUILT_IN[name])
    assert tokenizer.vocab_size == spec.vocab_size
    assert tokenizer.eos_token_ids


def test_the_folder_is_made_once(tmp_path: Path) -> None:
    assert find_ready("smollm2-135m", None, tmp_path, dummy=True) is None
    folder = fetch("smollm2-135m", revision=None, cache_dir=tmp_path, dummy=True)
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    assert find_ready("smollm2-135m", None, tmp_path, dummy=True) == folder
    assert fetch("smollm2-135m", revision=None, cache_dir=tmp_path, dummy=True) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written
    assert load_spec(folder) == parse_spec(BUILT_IN["smollm2-135m"])


def test_every_token_has_a_text_and_every_text_tokens(tmp_path: Path) -> None:
    folder = fetch("smollm2-135m", revision=None, cache_dir=tmp_path, dummy=True)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.decode([40000, 40001]) == " 40000 40001"
    assert all(tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size))
    assert tokenizer.eos_token_ids == {2}
    text = "Grüße, 世界! 40000\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    template = ChatTemplate.load(folder, special_tokens=tokenizer.named_tokens)
    assert template.render([{"role": "user", "content": "Hello"}]) == "user: Hello\nassistant: "


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        with pytest.raises(StartupFailed, match=f"{name}.* missing"):
            find_ready(str(tmp_path), None, tmp_path, dummy=True)
        (tmp_path / name).write_text("{}")
    assert find_ready(str(tmp_path), None, tmp_path, dummy=True) == tmp_path


@pytest.mark.parametrize("source", [None, "owner/model", "no-such"])
def test_anything_else_is_refused_with_the_names(source: str | None, tmp_path: Path) -> None:
    with pytest.raises(StartupFailed, match=r"built-in configurations: .*llama-3\.1-8b"):
        find_ready(source, None, tmp_path, dummy=True)


def test_a_revision_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupFailed, match="--revision main has no meaning without weights"):
        find_ready("llama-3.1-8b", "main", tmp_path, dummy=True)


def test_a_built_in_configuration_has_no_weights_to_load(tmp_path: Path) -> None:
    with pytest.raises(StartupFailed, match="can be run with --load-format dummy"):
        find_ready("llama-3.1-8b", None, tmp_path)
