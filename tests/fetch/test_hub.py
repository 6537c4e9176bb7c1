"""Downloads from a fake hub on loopback, by a real fetcher process."""

import hashlib
import json
import socket
from pathlib import Path

import pytest

from llmd.errors import StartupFailed
from llmd.fetch.source import find_ready
from tests.fetch.fake_hub import COMMIT, FakeHub, serving
from tests.fetch.fetcher_process import Outcome, run_fetcher, running_fetcher

pytestmark = pytest.mark.slow

WEIGHTS = hashlib.shake_256(b"weights").digest(3 << 20)
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"model_max_length": 64}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"never",
    "consolidated.safetensors": b"the same again",
    "onnx/model.onnx": b"never",
    "onnx/config.json": b"never",
    "README.md": b"never",
}
WANTED = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"}


@pytest.fixture(autouse=True)
def own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def fetch_from(hub: FakeHub, tmp_path: Path, source: str = "owner/model", revision: str | None = None) -> Outcome:
    environment = {"HF_ENDPOINT": hub.endpoint}
    return run_fetcher(source, cache_dir=tmp_path / "cache", revision=revision, environment=environment)


def test_a_repository_becomes_a_folder(tmp_path: Path) -> None:
    with serving(FakeHub(FILES)) as hub:
        outcome = fetch_from(hub, tmp_path)
    assert {path.name for path in outcome.ready.iterdir()} == WANTED
    assert (outcome.ready / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.sent.keys() == WANTED
    shares = [message.progress for message in outcome.progress if message.progress is not None]
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)
    assert "downloading owner/model (3 MB)" in {message.detail for message in outcome.progress}
    assert outcome.errors == ""


def test_what_is_there_is_found_without_the_hub(tmp_path: Path) -> None:
    assert find_ready("owner/model", None, tmp_path) is None
    with serving(FakeHub(FILES)) as hub:
        folder = fetch_from(hub, tmp_path).ready
    assert find_ready("owner/model", None, tmp_path) == folder
    assert find_ready("owner/model", COMMIT, tmp_path) == folder
    assert find_ready("owner/model", "other", tmp_path) is None
    (folder / "chat_template.jinja").unlink()
    assert find_ready("owner/model", None, tmp_path) is None


def test_a_connection_that_ends_early_is_taken_up_again(tmp_path: Path) -> None:
    # larger than the 10 MB pieces in which the library writes
    weights, cut_at = WEIGHTS * 8, 20 << 20
    with serving(FakeHub({**FILES, "model.safetensors": weights}, cut_at=cut_at)) as hub:
        outcome = fetch_from(hub, tmp_path)
    assert (outcome.ready / "model.safetensors").read_bytes() == weights
    # from the beginning it would be all of it
    assert hub.sent["model.safetensors"] - cut_at < len(weights)


def test_a_download_that_was_killed_keeps_the_files_that_were_complete(tmp_path: Path) -> None:
    with serving(FakeHub(FILES, stall_at=len(WEIGHTS) - 1)) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint}
        with running_fetcher("owner/model", cache_dir=tmp_path, environment=environment):
            hub.stalled.wait()
            while not list(tmp_path.rglob("snapshots/*/chat_template.jinja")):
                pass
        assert find_ready("owner/model", None, tmp_path) is None
        hub.stall_at = None
        hub.sent.clear()
        outcome = fetch_from(hub, tmp_path)
    assert (outcome.ready / "model.safetensors").read_bytes() == WEIGHTS
    assert "chat_template.jinja" not in hub.sent


def test_a_token_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(FakeHub(FILES, token="hf_secret")) as hub:
        assert "Set HF_TOKEN" in fetch_from(hub, tmp_path).failure
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert fetch_from(hub, tmp_path).ready.is_dir()


def test_unknown_revision(tmp_path: Path) -> None:
    with serving(FakeHub(FILES)) as hub:
        failure = fetch_from(hub, tmp_path, revision="v2").failure
    assert failure == "owner/model has no revision 'v2'. Give a branch, tag or commit that it has with --revision."


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "RepoNotFound", r"knows no model owner/model, or it is private \(HTTP 401\).*Set HF_TOKEN"),
        (404, "RepoNotFound", r"knows no model owner/model"),
        (403, "GatedRepo", r"owner/model is gated\. Accept its terms at http.*/owner/model and then set HF_TOKEN"),
        (403, "", r"or it is private \(HTTP 403\)"),
        (500, "", r"failed to deliver owner/model \(HTTP 500\)\. Try again later"),
    ],
)
def test_refusals(tmp_path: Path, status: int, code: str, message: str) -> None:
    with serving(FakeHub(FILES, refusal=(status, code))) as hub, pytest.raises(StartupFailed, match=message):
        raise StartupFailed(fetch_from(hub, tmp_path).failure)


def test_no_network(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        outcome = run_fetcher("owner/model", cache_dir=tmp_path, environment={"HF_ENDPOINT": endpoint})
    assert outcome.failure.startswith(f"owner/model could not be downloaded from {endpoint}: ")
    assert "Check the network" in outcome.failure


def test_offline_on_purpose(tmp_path: Path) -> None:
    outcome = run_fetcher("owner/model", cache_dir=tmp_path, environment={"HF_HUB_OFFLINE": "1"})
    assert "HF_HUB_OFFLINE forbids" in outcome.failure


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "only as pickle: pytorch_model.bin"),
        ({"model.Q4_0.gguf": b""}, "GGUF: model.Q4_0.gguf"),
        ({"README.md": b""}, "holds no weights"),
    ],
)
def test_repositories_without_safetensors_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with serving(FakeHub(files)) as hub:
        assert message in fetch_from(hub, tmp_path).failure
        assert not hub.sent


def test_missing_shards_are_named(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}).encode()
    with serving(FakeHub({**FILES, "model.safetensors.index.json": index})) as hub:
        assert "model-2.safetensors missing" in fetch_from(hub, tmp_path).failure
