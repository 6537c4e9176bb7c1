"""Work that cannot be captured."""

from collections.abc import Callable

import pytest

from llmd.errors import StartupFailed
from llmd.worker.captured_work import CapturedWork
from llmd.worker.rehearsal import NoStream


class WithoutGraphs(NoStream):
    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_capture_that_fails_names_the_remedy() -> None:
    done: list[str] = []
    work = CapturedWork(WithoutGraphs(), done.append, ["a step"])
    work.run("a step")
    with pytest.raises(StartupFailed, match=r"a step could not be captured.*not permitted.*--enforce-eager"):
        work.run("a step")
    assert done == ["a step"]
