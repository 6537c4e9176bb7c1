"""A folder that appears whole or not at all, made by one process at a time."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the right to make `target`; waits while another process holds it. A dead process holds nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _beside(target, ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `target` when the block ends well and vanishes when it does not.

    Call it inside `exclusive(target)`: what an earlier process left unfinished is removed first. Everything is on
    disk before the name `target` exists.
    """
    partial = _beside(target, ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            _sync(path)
        _sync(partial)
        partial.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _beside(target: Path, suffix: str) -> Path:
    # not with_suffix: a model's name is full of dots
    return target.with_name(target.name + suffix)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
