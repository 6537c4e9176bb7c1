"""Models that must first be made ready: the command fetches, tells how far it is, and serves."""

import os
from pathlib import Path

import httpx
import pytest
from gguf import GGMLQuantizationType

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer, running_server
from tests.fetch.fake_hub import FakeHub, serving
from tests.fetch.gguf_files import write_llama

pytestmark = pytest.mark.slow


def completed(server: RunningServer) -> str:
    body = {"prompt": "ab", "max_tokens": 3, "ignore_eos": True, "temperature": 0}
    response = httpx.post(f"{server.base_url}/completions", json=body, timeout=START_TIMEOUT)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_a_gguf_file_is_converted_once_and_served(tmp_path: Path) -> None:
    write_llama(tmp_path / "small.gguf", GGMLQuantizationType.Q8_0)
    arguments = ("--model", str(tmp_path / "small.gguf"), "--download-dir", str(tmp_path / "cache"))
    with running_server(*arguments) as server:
        first = completed(server)
        names = [model["id"] for model in httpx.get(f"{server.base_url}/models").json()["data"]]
        assert names == ["small"]
        assert any("converting" in line for line in server.log)
    with running_server(*arguments) as server:
        assert completed(server) == first
        assert not any("converting" in line for line in server.log)


def test_a_hub_id_is_downloaded_and_served(tiny_model_dir: Path, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in tiny_model_dir.iterdir()}
    with serving(FakeHub(files=files)) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
        with running_server("--model", hub.repo_id, environment=environment) as server:
            assert completed(server)
            assert httpx.get(f"{server.base_url}/models/{hub.repo_id}").json()["id"] == hub.repo_id
            assert any("downloading" in line for line in server.log)


def test_a_model_without_weights_is_served(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    with running_server("--model", str(tmp_path), "--load-format", "dummy") as server:
        assert completed(server) == completed(server)
