"""A process that hangs (SIGSTOP) is worse than one that dies: nothing tells. It is noticed by its silence and replaced,
and clients see a pause and nothing else. A process that is merely slow for a moment is left alone."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from soaking.asking import Answer

from tests.end_to_end.running_server import RunningServer, running_server
from tests.faults.asking import ENGINE, WORKER, answers, mixed_requests, num_restarts, send

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[RunningServer]:
    with running_server("--model", str(tiny_model_dir), "--hang-timeout", "3") as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(server: RunningServer) -> list[Answer]:
    return answers(server, mixed_requests())


@pytest.mark.parametrize("victim", [ENGINE, WORKER])
def test_a_hang_in_the_middle_of_answers(server: RunningServer, undisturbed: list[Answer], victim: str) -> None:
    restarts = num_restarts(server)

    def on_event(num_events: int) -> None:
        if num_events == 100:
            assert send(server, victim, signal.SIGSTOP)

    assert answers(server, mixed_requests(), on_event) == undisturbed
    assert num_restarts(server) == restarts + 1


@pytest.mark.parametrize("victim", [ENGINE, WORKER])
def test_a_moment_of_silence_is_no_death(server: RunningServer, undisturbed: list[Answer], victim: str) -> None:
    restarts = num_restarts(server)

    def on_event(num_events: int) -> None:
        if num_events == 100:
            # stopped and at once let go: what it was doing was cut in two, and goes on
            assert send(server, victim, signal.SIGSTOP)
            assert send(server, victim, signal.SIGCONT)

    assert answers(server, mixed_requests(), on_event) == undisturbed
    assert num_restarts(server) == restarts
