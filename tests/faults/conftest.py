"""Models that take longer than a test: what runs must not end before somebody leaves it."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def long_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model_dir`, with a context of 4096 tokens: seconds of work for one request."""
    from make_tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "long", max_position_embeddings=4096)
