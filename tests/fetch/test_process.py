"""The fetcher as the supervisor sees it: `python -m llmd.fetch` with a control socket."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from llmd.fetch.source import converted_dir, find_ready
from llmd.protocol.control import Stage
from tests.fetch.fetcher_process import run_fetcher, running_fetcher
from tests.fetch.gguf_files import write_llama

pytestmark = pytest.mark.slow


def test_a_gguf_file_becomes_a_folder(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", GGMLQuantizationType.Q8_0)
    outcome = run_fetcher(str(tmp_path / "m.gguf"), cache_dir=tmp_path / "cache")
    assert outcome.ready == converted_dir(tmp_path / "m.gguf", tmp_path / "cache")
    assert {message.stage for message in outcome.progress} == {Stage.FETCHING}
    assert [message.detail for message in outcome.progress] == ["converting m.gguf", "converting the weights"]
    assert outcome.errors == ""


def test_a_model_that_cannot_be_had_is_a_message(tmp_path: Path) -> None:
    outcome = run_fetcher(str(tmp_path / "no-such.gguf"), cache_dir=tmp_path)
    assert outcome.failure.startswith("There is no model at ")


def test_a_cache_that_cannot_be_written_is_a_message(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf")
    (tmp_path / "cache").write_text("a file where a folder should be")
    outcome = run_fetcher(str(tmp_path / "m.gguf"), cache_dir=tmp_path / "cache")
    assert "could not be made ready" in outcome.failure
    assert str(tmp_path / "cache") in outcome.failure


def test_two_at_once_convert_once(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf")
    source, cache = str(tmp_path / "m.gguf"), tmp_path / "cache"
    with running_fetcher(source, cache_dir=cache) as first, running_fetcher(source, cache_dir=cache) as second:
        outcomes = [first.wait(), second.wait()]
    assert outcomes[0].ready == outcomes[1].ready
    details = [message.detail for outcome in outcomes for message in outcome.progress]
    assert details.count("converting the weights") == 1


def test_a_killed_conversion_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    # large enough that the kill comes in the middle: 100 million zeros in blocks of 32
    embedding = np.zeros((400_000, 144), dtype=np.uint8)
    write_llama(tmp_path / "m.gguf", extra_tensors={"token_embd.weight": (embedding, GGMLQuantizationType.Q4_0)})
    source, cache = str(tmp_path / "m.gguf"), tmp_path / "cache"
    with running_fetcher(source, cache_dir=cache) as fetcher:
        fetcher.wait_progress("converting the weights")
    assert find_ready(source, None, cache) is None
    assert run_fetcher(source, cache_dir=cache).ready == find_ready(source, None, cache)
    assert not list(cache.rglob("*.partial"))
