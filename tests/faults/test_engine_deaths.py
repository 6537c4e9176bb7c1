"""Contract C1: whoever of the engine's side dies, at any moment, every client gets exactly the answer of an undisturbed
run: text, tokens, log-probabilities, endings, usage. Real processes; clients see a pause and nothing else."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from soaking.asking import Answer

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer, running_server
from tests.faults.asking import (
    ENGINE,
    WORKER,
    answers,
    mixed_requests,
    num_restarts,
    num_resumed,
    send,
)
from tests.faults.facts import wait_for

pytestmark = pytest.mark.slow

# of one engine with its worker after the other; ten processes
DEATHS = ((WORKER,), (ENGINE,), (ENGINE, WORKER), (ENGINE, WORKER), (ENGINE, WORKER), (ENGINE, WORKER))
# that clients get from an engine before it dies
NUM_EVENTS = 60


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[RunningServer]:
    with running_server("--model", str(tiny_model_dir)) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(server: RunningServer) -> list[Answer]:
    return answers(server, mixed_requests())


@pytest.mark.parametrize(("victim", "moment"), [(ENGINE, 1), (WORKER, 400)])
def test_one_death(server: RunningServer, undisturbed: list[Answer], victim: str, moment: int) -> None:
    restarts, resumed = num_restarts(server), num_resumed(server)

    def on_event(num_events: int) -> None:
        if num_events == moment:
            assert send(server, victim)

    assert answers(server, mixed_requests(), on_event) == undisturbed
    assert num_restarts(server) == restarts + 1
    assert num_resumed(server) > resumed


def test_a_death_while_it_restarts(server: RunningServer, undisturbed: list[Answer]) -> None:
    restarts = num_restarts(server)
    tasks = []

    async def kill_the_next() -> None:
        dead = server.child_pids()[WORKER]
        send(server, ENGINE)
        # the next worker is there, and far from ready
        await asyncio.to_thread(wait_for, lambda: server.child_pids().get(WORKER), lambda pid: pid not in (None, dead))
        assert send(server, WORKER)

    def on_event(num_events: int) -> None:
        if num_events == 50:
            tasks.append(asyncio.get_running_loop().create_task(kill_the_next()))

    assert answers(server, mixed_requests(), on_event) == undisturbed
    assert num_restarts(server) == restarts + 2


def test_ten_deaths_in_a_row(tiny_model_dir: Path, undisturbed: list[Answer]) -> None:
    pending = list(DEATHS)
    dead: dict[str, int] = {}
    num_events_of_the_dead = 0

    def on_event(num_events: int) -> None:
        nonlocal dead, num_events_of_the_dead
        # what an engine had sent before it died still comes; then the next one is there, or soon will be
        alive = server.child_pids()
        if dead and any(alive.get(module) in (None, pid) for module, pid in dead.items()):
            num_events_of_the_dead = num_events
        elif pending and num_events >= num_events_of_the_dead + NUM_EVENTS:
            dead = {module: alive[module] for module in (ENGINE, WORKER)}
            for victim in pending.pop(0):
                assert send(server, victim)

    with running_server("--model", str(tiny_model_dir)) as server:
        assert answers(server, mixed_requests(), on_event) == undisturbed
        assert not pending
        assert num_restarts(server) == len(DEATHS)
        assert num_resumed(server) > len(DEATHS)


def test_a_death_while_it_drains(tiny_model_dir: Path, undisturbed: list[Answer]) -> None:
    def on_event(num_events: int) -> None:
        if num_events == 200:
            server.process.send_signal(signal.SIGTERM)
        elif num_events == 260:
            assert send(server, ENGINE)

    with running_server("--model", str(tiny_model_dir), "--drain-timeout", str(START_TIMEOUT)) as server:
        assert answers(server, mixed_requests(), on_event) == undisturbed
        assert server.process.wait(START_TIMEOUT) == 0
