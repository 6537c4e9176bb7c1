"""Contract C1: whoever of the engine's side dies, at any moment, every client gets exactly the answer of an undisturbed
run: text, tokens, log-probabilities, endings, usage. Real processes; clients see a pause and nothing else."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from soaking.asking import Answer

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer, running_server
from tests.faults.asking import ENGINE, WORKER, answers, flags, mixed_requests, num_restarts, send, wait_until

pytestmark = pytest.mark.slow

BOTH = (ENGINE, WORKER)
# events that clients have had → who dies then; ten deaths
TEN_DEATHS = {
    30: (WORKER,),
    60: (ENGINE,),
    150: BOTH,
    300: BOTH,
    500: BOTH,
    800: BOTH,
}


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[RunningServer]:
    with running_server(*flags(tiny_model_dir)) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(server: RunningServer) -> list[Answer]:
    return answers(server, mixed_requests())


@pytest.mark.parametrize(("victim", "moment"), [(ENGINE, 1), (WORKER, 400)])
def test_one_death(server: RunningServer, undisturbed: list[Answer], victim: str, moment: int) -> None:
    restarts = num_restarts(server)

    def on_event(num_events: int) -> None:
        if num_events == moment:
            assert send(server, victim)

    assert answers(server, mixed_requests(), on_event) == undisturbed
    assert num_restarts(server) == restarts + 1


def test_a_death_while_it_restarts(server: RunningServer, undisturbed: list[Answer]) -> None:
    restarts = num_restarts(server)
    tasks = []

    async def kill_the_next() -> None:
        dead = server.child_pids()[WORKER]
        send(server, ENGINE)
        # the next worker is there, and far from ready
        await asyncio.to_thread(wait_until, lambda: server.child_pids().get(WORKER, dead) != dead)
        assert send(server, WORKER)

    def on_event(num_events: int) -> None:
        if num_events == 50:
            tasks.append(asyncio.get_running_loop().create_task(kill_the_next()))

    assert answers(server, mixed_requests(), on_event) == undisturbed
    assert num_restarts(server) == restarts + 2


def test_ten_deaths_in_a_row(tiny_model_dir: Path, undisturbed: list[Answer]) -> None:
    def on_event(num_events: int) -> None:
        for victim in TEN_DEATHS.get(num_events, ()):
            assert send(server, victim)

    with running_server(*flags(tiny_model_dir)) as server:
        assert answers(server, mixed_requests(), on_event) == undisturbed
        assert num_restarts(server) == len(TEN_DEATHS)


def test_a_death_while_it_drains(tiny_model_dir: Path, undisturbed: list[Answer]) -> None:
    def on_event(num_events: int) -> None:
        if num_events == 200:
            server.process.send_signal(signal.SIGTERM)
        elif num_events == 260:
            assert send(server, ENGINE)

    with running_server(*flags(tiny_model_dir), "--drain-timeout", str(START_TIMEOUT)) as server:
        assert answers(server, mixed_requests(), on_event) == undisturbed
        assert server.process.wait(START_TIMEOUT) == 0
