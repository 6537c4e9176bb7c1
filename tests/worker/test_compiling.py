"""Kernels are compiled beside other work, once; nothing that goes wrong with it stops anybody."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from triton import knobs

from llmd.worker.compiling import compiling_beside, digest_of
from llmd_kernels import gated_mul
from tests.kernels.proof.compiler import absent_gpu


@pytest.fixture(autouse=True)
def absent_device(tmp_path: Path) -> Iterator[None]:
    with absent_gpu("sm_90"), knobs.cache.scope():
        knobs.cache.dir = str(tmp_path / "kernels")
        yield
        # one that was left alone still has Triton's launches in its hands, which other tests replace too
        for thread in threading.enumerate():
            if thread.name == "rehearsal":
                thread.join(60)


def launch(size: int) -> None:
    gated_mul(torch.empty(3, 2 * size, dtype=torch.bfloat16, device="meta"), "silu")


def test_what_was_compiled_once_is_not_rehearsed_again(tmp_path: Path) -> None:
    done, loading = tmp_path / "complete" / "this model", threading.Event()
    rehearsals: list[int] = []
    heard: list[float] = []

    def rehearsal() -> Iterator[None]:
        # beside the work inside of the block, not after it
        assert loading.wait(60)
        rehearsals.append(1)
        launch(96)
        yield

    for _ in range(2):
        with compiling_beside(rehearsal, done=done, progress=heard.append):
            loading.set()
        assert done.exists()
        assert len(list((tmp_path / "kernels").rglob("*.cubin"))) == 1
    assert rehearsals == [1]
    assert all(0 <= part <= 1 for part in heard)


def test_an_error_is_logged_and_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def rehearsal() -> Iterator[None]:
        launch(64)
        yield
        raise ZeroDivisionError("no kernel for this")

    done = tmp_path / "this model"
    with compiling_beside(rehearsal, done=done, progress=lambda _: None):
        pass
    assert "no kernel for this" in caplog.text
    assert "could not be compiled ahead" in caplog.text
    assert not done.exists()


def test_a_start_that_fails_does_not_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    launched, failed = threading.Event(), threading.Event()
    ended = threading.Event()

    def rehearsal() -> Iterator[None]:
        try:
            for size in range(8, 10_000, 8):
                launch(size)
                launched.set()
                yield
                assert failed.wait(60)
        finally:
            ended.set()

    done = tmp_path / "this model"

    def fail() -> None:
        with compiling_beside(rehearsal, done=done, progress=lambda _: None):
            assert launched.wait(60)
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    failed.set()
    assert ended.wait(60)
    assert not done.exists()
    assert caplog.text == ""


def test_the_digest_is_of_all_facts() -> None:
    assert digest_of(1, torch.float16) == digest_of(1, torch.float16) != digest_of(2, torch.float16)
