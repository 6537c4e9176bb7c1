"""What can be typed, and what it comes to."""

from pathlib import Path

import pytest

from llmd.cli.flags import build_parser, byte_count, token_count, with_config_file
from llmd.cli.resolve import resolve
from llmd.config import Config
from llmd.errors import StartupFailed


def config(*arguments: str) -> Config:
    return resolve(build_parser().parse_args(with_config_file(["serve", *arguments])))


def test_nothing_typed_is_the_demo_model_on_loopback() -> None:
    assert config().model.source is None
    assert config().model.served_names == ("SmolLM2-135M-Instruct",)
    assert (config().http.host, config().http.port) == ("127.0.0.1", 8000)
    assert config().cache.prefix_caching


def test_the_model_is_an_argument_or_a_flag() -> None:
    assert config("owner/name").model.source == config("--model", "owner/name").model.source == "owner/name"
    assert config("owner/name").model.served_names == ("owner/name",)
    with pytest.raises(StartupFailed, match="two models"):
        config("owner/name", "--model", "owner/other")


def test_a_folder_is_served_under_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "My-Model").mkdir()
    assert config(str(tmp_path / "My-Model")).model.served_names == ("My-Model",)
    (tmp_path / "small.gguf").touch()
    assert config(str(tmp_path / "small.gguf")).model.served_names == ("small",)


@pytest.mark.parametrize(("text", "count"), [("8192", 8192), ("32k", 32_000), ("32K", 32_768), ("1.5k", 1500)])
def test_token_counts(text: str, count: int) -> None:
    assert token_count(text) == count


@pytest.mark.parametrize(("text", "count"), [("1024", 1024), ("4G", 4 << 30), ("512m", 512 << 20)])
def test_byte_counts(text: str, count: int) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize(
    "arguments",
    [
        ("--max-model-len", "0"),
        ("--max-model-len", "long"),
        ("--kv-cache-memory-bytes", "-1"),
        ("--gpu-memory-utilization", "1.5"),
        ("--block-size", "7"),
        ("--port", "70000"),
        ("--max-num-seqs", "0"),
        ("--dtype", "int4"),
        ("--max-model", "5"),  # no abbreviations
    ],
    ids=" ".join,
)
def test_nonsense_is_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        config(*arguments)
    assert refused.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_file_holds_the_same_names_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "llmd.toml"
    file.write_text(
        'model = "owner/name"\nport = 9000\nserved-model-name = ["a", "b"]\n'
        'enable_prefix_caching = false\nmax-model-len = "4K"\n'
    )
    typed = config("--config", str(file), "--port", "9001")
    assert typed.model.source == "owner/name"
    assert typed.model.served_names == ("a", "b")
    assert typed.model.max_model_len == 4096
    assert typed.http.port == 9001
    assert not typed.cache.prefix_caching
    # a list in the file does not take the argument that follows
    assert config("--config", str(file), "owner/name").model.served_names == ("a", "b")


def test_a_file_with_an_unknown_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "llmd.toml"
    file.write_text("prot = 9000\n")
    with pytest.raises(SystemExit):
        config("--config", str(file))
    assert "--prot" in capsys.readouterr().err
    file.write_text("not toml")
    with pytest.raises(StartupFailed, match="toml"):
        config("--config", str(file))


def test_a_chat_template_is_a_file_or_its_text(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}")
    assert config("--chat-template", str(file)).model.chat_template == "{{ messages }}"
    assert config("--chat-template", "{{ messages }}").model.chat_template == "{{ messages }}"
    with pytest.raises(StartupFailed, match="missing"):
        config("--chat-template", str(tmp_path / "missing"))


def test_a_step_must_hold_every_running_sequence() -> None:
    with pytest.raises(StartupFailed, match="--max-num-seqs 64"):
        config("--max-num-batched-tokens", "32")
    assert config("--max-num-seqs", "1000").scheduler.max_num_batched_tokens >= 1000


def test_help_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    text = capsys.readouterr().out
    assert all(f"\n{group}:\n" in text for group in ("model", "device and memory", "scheduling", "HTTP"))
