"""Folders that appear whole or not at all."""

import threading
from pathlib import Path

import pytest

from llmd.fetch.folder import exclusive, new_folder


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model-1.5"
    with exclusive(target), new_folder(target) as folder:
        (folder / "config.json").write_text("{}")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert not folder.exists()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def fail() -> None:
        with exclusive(target), new_folder(target) as folder:
            (folder / "config.json").write_text("{}")
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["model.lock"]


def test_what_a_killed_process_left_is_not_taken_over(tmp_path: Path) -> None:
    target = tmp_path / "model"
    stale = tmp_path / "model.partial"
    stale.mkdir()
    (stale / "half.safetensors").write_text("half")
    with exclusive(target), new_folder(target) as folder:
        (folder / "config.json").write_text("{}")
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert not stale.exists()


def test_one_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "model"
    order: list[str] = []
    inside, waiting = threading.Event(), threading.Event()

    def second() -> None:
        inside.wait()
        waiting.set()
        with exclusive(target):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with exclusive(target):
        inside.set()
        waiting.wait()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
