"""What the user may name, what is ready, and what is refused with which advice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmd.errors import StartupFailed
from llmd.fetch import fetch
from llmd.fetch.source import SourceKind, classify, default_cache_dir, demo_dir, find_ready, hub_cache_dir
from tests.fetch.gguf_files import write_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_folder(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def test_kinds(tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf")
    assert classify(None, None) is SourceKind.DEMO
    assert classify(str(tmp_path), None) is SourceKind.FOLDER
    assert classify(str(tmp_path / "model.gguf"), None) is SourceKind.GGUF
    assert classify("Qwen/Qwen2.5-0.5B-Instruct", "main") is SourceKind.HUB


def test_what_cannot_be_looked_at_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(StartupFailed, match=r"cannot be read: .*File name too long"):
        find_ready("x" * 5000, None, tmp_path)


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "owner" / "model", "config.json", "tokenizer.json", "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert find_ready("owner/model", None, tmp_path) == tmp_path / "owner" / "model"


@pytest.mark.parametrize("source", ["no-such", "./no/such", "/no/such", "owner/model.gguf", "a/b/c", "~/no-such"])
def test_nothing_there(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartupFailed, match=r"There is no model at .* hub id of the form owner/name"):
        find_ready(source, None, tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_complete_folder_is_ready(tmp_path: Path, sharded: bool) -> None:
    folder = make_folder(tmp_path / "m", "config.json", "tokenizer.json", "model-1.safetensors")
    if sharded:
        index = {"weight_map": {"a": "model-1.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_ready(str(folder), None, tmp_path) == folder
    assert fetch(str(folder), revision=None, cache_dir=tmp_path) == folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tokenizer.json", "model.safetensors"), r"config\.json missing"),
        (("config.json", "model.safetensors"), r"tokenizer\.json missing"),
        (("config.json", "tokenizer.json"), r"weights \(\*\.safetensors\) missing"),
        ((), r"config\.json, tokenizer\.json, weights \(\*\.safetensors\) missing"),
        (("config.json", "pytorch_model.bin"), r"only as pickle: pytorch_model\.bin\. llmd does not load pickle"),
        (("a.Q4.gguf", "b.Q8.gguf"), r"GGUF: a\.Q4\.gguf, b\.Q8\.gguf\. Give the path of one"),
    ],
)
def test_an_incomplete_folder_is_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(StartupFailed, match=message):
        find_ready(str(make_folder(tmp_path / "m", *names)), None, tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "config.json", "tokenizer.json", "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StartupFailed, match=r"model-2\.safetensors missing"):
        find_ready(str(folder), None, tmp_path)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(StartupFailed, match="not a readable index"):
        find_ready(str(folder), None, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "Give the folder that it is in"),
        ("model.bin", "does not load pickle"),
        ("model.gguf", "is not a GGUF file"),
        ("notes.txt", "is not a GGUF file"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(StartupFailed, match=message):
        find_ready(str(tmp_path / name), None, tmp_path)


def test_a_revision_of_something_else_than_a_hub_id_is_refused(tmp_path: Path) -> None:
    for source, what in ((None, "the demo model"), (str(tmp_path), "the folder")):
        with pytest.raises(StartupFailed, match=f"--revision v1 names .* the model is {what}"):
            find_ready(source, "v1", tmp_path)


def test_a_conversion_is_found_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "m.Q8_0.gguf"
    write_llama(path)
    assert find_ready(str(path), None, tmp_path / "cache") is None
    folder = fetch(str(path), revision=None, cache_dir=tmp_path / "cache")
    assert find_ready(str(path), None, tmp_path / "cache") == folder
    assert find_ready(str(folder), None, tmp_path / "cache") == folder
    path.write_bytes(path.read_bytes() + b"\0")
    assert find_ready(str(path), None, tmp_path / "cache") is None


def test_the_demo_model_is_found(tmp_path: Path) -> None:
    assert find_ready(None, None, tmp_path) is None
    make_folder(demo_dir(tmp_path))
    assert find_ready(None, None, tmp_path) == demo_dir(tmp_path)


def test_a_snapshot_of_an_older_library_is_found_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--model"
    snapshot = make_folder(repository / "snapshots" / COMMIT, "config.json", "tokenizer.json")
    (make_folder(repository / "refs") / "main").write_text(COMMIT)
    assert find_ready("owner/model", None, tmp_path) is None
    make_folder(snapshot, "model.safetensors")
    assert find_ready("owner/model", None, tmp_path) == snapshot
    assert find_ready("owner/model", "main", tmp_path) == snapshot
    assert find_ready("owner/model", COMMIT, tmp_path) == snapshot
    assert find_ready("owner/model", "v2", tmp_path) is None


def test_cache_folders_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert default_cache_dir() == Path("/home/someone/.cache/llmd")
    assert hub_cache_dir() == Path("/home/someone/.cache/huggingface/hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_dir() == Path("/caches/llmd")
    assert hub_cache_dir() == Path("/caches/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "~/hf")
    assert hub_cache_dir() == Path("/home/someone/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "$HOME/hub")
    assert hub_cache_dir() == Path("/home/someone/hub")


def test_looking_needs_nothing_but_the_standard_library() -> None:
    program = (
        "import sys; from llmd.fetch.source import find_ready; before = set(sys.modules)\n"
        "foreign = {name.partition('.')[0] for name in before} - set(sys.stdlib_module_names)\n"
        "print(sorted(name for name in foreign if not name.startswith('_')))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "['llmd']"
