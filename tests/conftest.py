"""Models that tests share: a tiny random one, and the demo model with its real weights."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# scripts and benches are programs, not packages; the one that makes tiny models and the soak are also ours to call
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "bench")]


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer and a chat template."""
    from make_tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder, fetched once into the user's cache as the command would."""
    from llmd.fetch import fetch
    from llmd.fetch.source import default_cache_dir

    return fetch(None, revision=None, cache_dir=default_cache_dir())
