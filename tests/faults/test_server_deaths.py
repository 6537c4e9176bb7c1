"""A server process that dies takes its own clients with it and nothing else: the port never closes, the clients of the
other server get the answers of an undisturbed run, and another process takes its place."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from soaking.asking import Answer, Connection, ask
from soaking.server import child_pids, client_ports

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer, running_server
from tests.faults.asking import answers, client, mixed_requests, num_restarts
from tests.faults.facts import wait_for

pytestmark = pytest.mark.slow


class Disturbance:
    """One of the server processes is killed at an event; which clients are its own, the kernel knows."""

    def __init__(self, server: RunningServer, *, moment: int) -> None:
        self._server = server
        self._moment = moment
        self._num_events = 0
        self.cut_ports: set[int] = set()
        self.survivor = 0

    def on_event(self, _: object) -> None:
        self._num_events += 1
        if self._num_events == self._moment:
            # the one with more clients; a stopped process takes no more of them
            pids = child_pids(self._server.process.pid, "llmd.server")
            self.survivor, victim = sorted(pids, key=lambda pid: len(client_ports(pid)))
            os.kill(victim, signal.SIGSTOP)
            self.cut_ports = client_ports(victim)
            os.kill(victim, signal.SIGKILL)


async def knock(server: RunningServer, is_over: asyncio.Event) -> int:
    """Open connections all the time; how many. Raises OSError if one is refused."""
    host, port = server.url.removeprefix("http://").split(":")
    num_knocks = 0
    while not is_over.is_set():
        _, writer = await asyncio.open_connection(host, int(port))
        writer.close()
        num_knocks += 1
        with suppress(TimeoutError):
            await asyncio.wait_for(is_over.wait(), 0.01)
    return num_knocks


async def ask_through(server: RunningServer, disturbance: Disturbance) -> list[Answer | None]:
    """Every request's answer; None where its connection was cut."""

    async def ask_one(path: str, body: dict[str, object]) -> Answer | None:
        connection = Connection()
        try:
            return await ask(http, path, body, connection=connection, on_event=disturbance.on_event)
        except httpx.TransportError:
            assert connection.local_port in disturbance.cut_ports
            return None

    is_over = asyncio.Event()
    async with client(server) as http, asyncio.TaskGroup() as group:
        knocking = group.create_task(knock(server, is_over))
        given = await asyncio.gather(*(ask_one(*request) for request in mixed_requests()))
        is_over.set()
    assert knocking.result() > 0
    return given


def test_the_others_go_on(tiny_model_dir: Path) -> None:
    with running_server("--model", str(tiny_model_dir), "--api-server-count", "2") as server:
        undisturbed = answers(server, mixed_requests())
        disturbance = Disturbance(server, moment=200)
        given = asyncio.run(ask_through(server, disturbance))

        assert all(answer in (None, expected) for answer, expected in zip(given, undisturbed, strict=True))
        assert 0 < given.count(None) < len(given)
        assert num_restarts(server) == 0  # of the engine

        # the one that is left takes no connections now, so that all go to the new one
        os.kill(disturbance.survivor, signal.SIGSTOP)
        wait_for(lambda: httpx.get(f"{server.url}/health", timeout=START_TIMEOUT).status_code, lambda code: code == 200)
        assert answers(server, mixed_requests()) == undisturbed
