"""Who leaves is not worked for: however a client goes and whatever its request is at, the engine is at rest after it,
and nothing of the request is left in any process. Real processes, clients of bare sockets."""

import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.running_server import RunningServer, running_server
from tests.faults.clients import (
    CLOSE,
    WAYS,
    Way,
    address,
    all_ways,
    connect,
    fin,
    read_all,
    read_until,
    request_bytes,
    rst,
)
from tests.faults.facts import (
    Figures,
    Holdings,
    busy_threads,
    figures,
    holdings,
    num_connections,
    resident_bytes,
    wait_for,
)

pytestmark = pytest.mark.slow

# far more than any test waits for: whoever comes to the end of it was not cancelled
MANY_TOKENS = 3000
LONG = {"prompt": "abc", "max_tokens": MANY_TOKENS, "ignore_eos": True, "temperature": 0.5}

# for 500 clients that leave at once; the promise is 2 s on a machine that does nothing else
STORM_GUARD = 20.0
NUM_CLIENTS = 500


@pytest.fixture(scope="module")
def server(long_model_dir: Path) -> Iterator[RunningServer]:
    # few tokens a step, so that a long prompt takes many; few sequences, so that some must wait
    limits = ("--max-num-batched-tokens", "8", "--max-num-seqs", "4", "--max-num-queued-reqs", "4000")
    with running_server("--model", str(long_model_dir), *limits) as running:
        # the tokenizer keeps its threads from the first list of prompts on
        say(running, request_bytes({**LONG, "prompt": ["a", "b"], "max_tokens": 1}, headers=CLOSE))
        yield running
        assert running.process.poll() is None
        assert running.stop() == 0


@pytest.fixture(scope="module", autouse=True)
def at_rest(server: RunningServer) -> Iterator[Holdings]:
    """What the processes hold when nobody asks for anything; so it is again when all tests are done."""
    at_rest = holdings(server)
    yield at_rest
    wait_for(lambda: holdings(server), lambda now: now == at_rest)


@pytest.fixture(scope="module")
def ways(server: RunningServer) -> Iterator[dict[str, Way]]:
    with all_ways(server) as found:
        yield found


def assert_nothing_is_left(
    server: RunningServer, before: Figures, *, num_aborted: int = 0, max_tokens: int = 0
) -> None:
    """The engine comes to rest before it has done what was asked, and computes nothing but the next request."""
    server_pid = server.child_pids()["llmd.server"]
    wait_for(lambda: busy_threads(server_pid), lambda names: not any(name.startswith("encode") for name in names))
    rest = wait_for(
        lambda: figures(server), lambda now: now.is_idle and now.num_aborted == before.num_aborted + num_aborted
    )
    assert rest.num_ended - before.num_ended == num_aborted
    assert rest.num_output_tokens - before.num_output_tokens <= max_tokens
    probe = request_bytes({**LONG, "max_tokens": 1}, headers=CLOSE)
    # an engine that was replaced may be ready before the server has met it
    wait_for(lambda: say(server, probe), lambda answer: answer.startswith(b"HTTP/1.1 200"))
    # the engine's figures come some time after what they tell
    after = wait_for(
        lambda: figures(server), lambda now: now.is_idle and now.num_output_tokens > rest.num_output_tokens
    )
    assert after.num_output_tokens == rest.num_output_tokens + 1
    assert after.num_ended == rest.num_ended + 1


def say(server: RunningServer, request: bytes) -> bytes:
    with connect(address(server)) as client:
        client.sendall(request)
        return read_all(client)


# --- every moment, every way


@dataclass(frozen=True)
class Moment:
    """A request, and how to know that it has come so far."""

    body: dict[str, Any]
    reached: Callable[[RunningServer, Figures], object]
    num_sequences: int = 1


def decodes(server: RunningServer, before: Figures) -> None:
    wait_for(lambda: figures(server), lambda now: now.num_output_tokens > before.num_output_tokens)


def prefills(server: RunningServer, before: Figures) -> None:
    now = wait_for(lambda: figures(server), lambda now: now.num_running > 0)
    assert now.num_output_tokens == before.num_output_tokens


def tokenizes(server: RunningServer, before: Figures) -> None:
    pid = server.child_pids()["llmd.server"]
    wait_for(lambda: busy_threads(pid), lambda names: any(name.startswith("encode") for name in names))


LONG_PROMPTS = [letter * 3900 for letter in "abcde"]
MOMENTS = {
    "tokenizing": Moment({**LONG, "prompt": ["x" * 3000] * 400, "max_tokens": 10}, tokenizes, num_sequences=0),
    "prefilling": Moment({**LONG, "prompt": LONG_PROMPTS, "max_tokens": 10}, prefills, num_sequences=5),
    "decoding": Moment(LONG, decodes),
    "decoding n = 4": Moment({**LONG, "n": 4}, decodes, num_sequences=4),
    "decoding 5 prompts": Moment({**LONG, "prompt": ["a", "b", "c", "d", "e"]}, decodes, num_sequences=5),
    "decoding with stop strings": Moment({**LONG, "stop": ["never said", "nor this"]}, decodes),
}


# every moment with every way, streamed and not in turns
CASES = [(moment, way, (i + j) % 2 == 0) for i, moment in enumerate(MOMENTS) for j, way in enumerate(WAYS)]


@pytest.mark.parametrize(("moment", "way", "stream"), CASES)
def test_a_client_leaves(server: RunningServer, ways: dict[str, Way], moment: str, way: str, stream: bool) -> None:
    before = figures(server)
    asked = MOMENTS[moment]
    client = ways[way].connect()
    # a salt of its own: nothing of it is in the cache
    client.sendall(request_bytes({**asked.body, "stream": stream, "cache_salt": f"{moment} {way}"}))
    asked.reached(server, before)
    ways[way].leave(client)
    max_tokens = (asked.num_sequences * asked.body["max_tokens"]) // 2
    assert_nothing_is_left(server, before, num_aborted=asked.num_sequences, max_tokens=max_tokens)
    if moment == "prefilling":
        assert figures(server).num_computed_tokens - before.num_computed_tokens < len("".join(LONG_PROMPTS)) / 2


@pytest.mark.parametrize("way", WAYS)
def test_a_client_leaves_in_the_middle_of_its_upload(
    server: RunningServer, at_rest: Holdings, ways: dict[str, Way], way: str
) -> None:
    before = figures(server)
    client = ways[way].connect()
    client.sendall(request_bytes({**LONG, "prompt": "x" * 200_000})[:100_000])
    wait_for(lambda: num_connections(server), lambda number: number == 1)
    ways[way].leave(client)
    wait_for(lambda: holdings(server), lambda now: now == at_rest)
    assert_nothing_is_left(server, before)


@pytest.mark.parametrize("way", WAYS)
def test_a_client_leaves_the_queue(server: RunningServer, ways: dict[str, Way], way: str) -> None:
    before = figures(server)
    with connect(address(server)) as running:
        running.sendall(request_bytes({**LONG, "n": 4, "stream": True}))
        wait_for(lambda: figures(server), lambda now: now.num_running == 4)
        waiting = ways[way].connect()
        waiting.sendall(request_bytes({**LONG, "n": 2, "stream": way != "fin"}))
        wait_for(lambda: figures(server), lambda now: now.num_waiting == 2)
        ways[way].leave(waiting)
        after = wait_for(lambda: figures(server), lambda now: now.num_waiting == 0)
        # those that run go on
        assert (after.num_running, after.num_aborted) == (4, before.num_aborted + 2)
        fin(running)
    assert_nothing_is_left(server, before, num_aborted=6, max_tokens=4 * MANY_TOKENS // 2)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("leave", [fin, rst])
def test_a_client_leaves_just_after_the_last_token(
    server: RunningServer, leave: Callable[[socket.socket], None], stream: bool
) -> None:
    """Whatever comes first, the request ends once."""
    before = figures(server)
    num_clients = 10
    for number in range(num_clients):
        client = connect(address(server))
        client.sendall(request_bytes({**LONG, "max_tokens": 1, "stream": stream}))
        # with the first byte of the answer, and with the last
        read_until(client, b"HTTP/1.1 200" if number % 2 else b"[DONE]" if stream else b"total_tokens")
        leave(client)
    wait_for(lambda: figures(server), lambda now: now.num_ended >= before.num_ended + num_clients)
    say(server, request_bytes({**LONG, "max_tokens": 1}, headers=CLOSE))
    rest = wait_for(lambda: figures(server), lambda now: now.is_idle)
    assert rest.num_ended == before.num_ended + num_clients + 1
    assert rest.num_output_tokens <= before.num_output_tokens + num_clients + 1


def test_a_proxy_that_keeps_its_connection_gets_its_answers_in_order(server: RunningServer) -> None:
    """HTTP/1.1 has no word for "never mind": who sends the next request has not left, and the first one goes on."""
    before = figures(server)
    short = {**LONG, "max_tokens": 20, "return_token_ids": True}
    first, second = request_bytes({**short, "seed": 1}), request_bytes({**short, "seed": 2}, headers=CLOSE)
    answers = say(server, first + second)
    assert answers.count(b"HTTP/1.1 200") == 2
    alone = [say(server, request_bytes({**short, "seed": seed}, headers=CLOSE)) for seed in (1, 2)]
    token_ids = [_token_ids(answer) for answer in alone]
    assert [_token_ids(answer) for answer in answers.split(b"HTTP/1.1 200")[1:]] == token_ids
    assert token_ids[0] != token_ids[1]
    assert figures(server).num_aborted == before.num_aborted


def _token_ids(answer: bytes) -> list[int]:
    ids: list[int] = json.loads(answer[answer.index(b"{") :])["choices"][0]["token_ids"]
    return ids


@pytest.mark.parametrize("leave", [fin, rst])
def test_a_client_leaves_with_its_next_request_sent(
    server: RunningServer, leave: Callable[[socket.socket], None]
) -> None:
    before = figures(server)
    client = connect(address(server))
    client.sendall(request_bytes(LONG) + request_bytes(LONG))
    decodes(server, before)
    leave(client)
    # the second one never begins
    assert_nothing_is_left(server, before, num_aborted=1, max_tokens=MANY_TOKENS // 2)


def test_clients_leave_while_the_engine_is_restarted(server: RunningServer, ways: dict[str, Way]) -> None:
    before = figures(server)
    leaving = []
    for stream in (True, False):
        for way in ways.values():
            client = way.connect()
            client.sendall(request_bytes({**LONG, "stream": stream}))
            leaving.append((way, client))
    wait_for(lambda: figures(server), lambda now: now.num_running + now.num_waiting == len(leaving))
    os.kill(server.child_pids()["llmd.worker"], signal.SIGKILL)
    wait_for(lambda: health(server), lambda status: status != b"ok")
    for way, client in leaving:
        way.leave(client)
    aborted = wait_for(lambda: figures(server), lambda now: now.num_aborted == before.num_aborted + len(leaving))
    wait_for(lambda: health(server), lambda status: status == b"ok")
    # the next engine never heard of them
    rest = wait_for(lambda: figures(server), lambda now: now.is_idle)
    assert rest.num_computed_tokens == aborted.num_computed_tokens
    assert rest.num_ended == aborted.num_ended
    assert_nothing_is_left(server, rest)


def health(server: RunningServer) -> bytes:
    answer = say(server, f"GET /health HTTP/1.1\r\nHost: test\r\n{CLOSE}\r\n".encode())
    status: bytes = json.loads(answer[answer.index(b"{") :])["status"].encode()
    return status


# --- deadlines


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_deadline_passes_while_the_engine_hangs(server: RunningServer, stream: bool) -> None:
    before = figures(server)
    worker = server.child_pids()["llmd.worker"]
    with connect(address(server)) as begun, connect(address(server)) as queued:
        begun.sendall(request_bytes({**LONG, "n": 4, "timeout": 1.5, "stream": stream}, headers=CLOSE))
        decodes(server, before)
        os.kill(worker, signal.SIGSTOP)
        try:
            queued.sendall(request_bytes({**LONG, "timeout": 0.5, "stream": stream}, headers=CLOSE))
            late, early = read_all(queued), read_all(begun)
        finally:
            os.kill(worker, signal.SIGCONT)
    assert b"deadline_exceeded" in late
    assert late.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 408")
    # it ends with what it has
    assert early.startswith(b"HTTP/1.1 200")
    assert early.count(b'"finish_reason":"length"') == 4
    rest = wait_for(lambda: figures(server), lambda now: now.is_idle)
    assert rest.num_ended == before.num_ended + 5
    assert rest.num_output_tokens - before.num_output_tokens < 4 * MANY_TOKENS


def test_a_deadline_passes_while_the_engine_is_dead(server: RunningServer) -> None:
    before = figures(server)
    with connect(address(server)) as client:
        client.sendall(request_bytes({**LONG, "timeout": 1.2, "stream": True}, headers=CLOSE))
        decodes(server, before)
        os.kill(server.child_pids()["llmd.worker"], signal.SIGKILL)
        answer = read_all(client)
    dead = figures(server)
    assert b'"finish_reason":"length"' in answer
    assert b"data: [DONE]" in answer
    wait_for(lambda: health(server), lambda status: status == b"ok")
    # the next engine is not asked for the rest
    rest = wait_for(lambda: figures(server), lambda now: now.is_idle)
    assert rest.num_computed_tokens == dead.num_computed_tokens
    assert_nothing_is_left(server, rest)


# --- all at once


def storm_bodies() -> Iterator[dict[str, Any]]:
    """Requests of every kind, one a client; always the same ones."""
    draw = random.Random(1)
    for number in range(NUM_CLIENTS):
        body = {**LONG, "prompt": f"{number} " + "x" * draw.choice([1, 50, 500]), "stream": draw.random() < 0.6}
        yield {**body, "n": draw.choice([1, 1, 1, 3])}


def storm(server: RunningServer, *, until: Callable[[Figures, int], bool]) -> tuple[list[socket.socket], int]:
    """All clients with their requests, once what they asked for is in the engine; and how many sequences that is."""
    bodies = list(storm_bodies())
    num_sequences = sum(body["n"] for body in bodies)
    clients = []
    for body in bodies:
        client = connect(address(server))
        client.sendall(request_bytes(body))
        clients.append(client)
    wait_for(lambda: figures(server), lambda now: until(now, num_sequences))
    return clients, num_sequences


def leave_all(clients: list[socket.socket]) -> None:
    for number, client in enumerate(clients):
        (fin, rst)[number % 2](client)


def test_500_clients_leave_at_once(server: RunningServer, at_rest: Holdings) -> None:
    memory = []
    for _ in range(3):
        before = figures(server)
        clients, num_sequences = storm(server, until=lambda now, asked: now.num_running + now.num_waiting == asked)
        begun = time.monotonic()
        leave_all(clients)
        rest = wait_for(lambda: figures(server), lambda now: now.is_idle)
        seconds = time.monotonic() - begun
        print(f"{NUM_CLIENTS} clients left: at rest after {seconds:.2f} s")
        assert seconds < STORM_GUARD
        assert rest.num_aborted == before.num_aborted + num_sequences
        wait_for(lambda: holdings(server), lambda now: now == at_rest)
        assert_nothing_is_left(server, rest)
        memory.append(resident_bytes(server))
    # the first one may warm up what is kept
    assert memory[2] - memory[0] < 32 << 20


def test_500_clients_leave_a_dead_engine(server: RunningServer, at_rest: Holdings) -> None:
    before = figures(server)
    pid = server.child_pids()["llmd.server"]
    clients, num_sequences = storm(server, until=lambda now, asked: now.num_running + now.num_waiting == asked)
    os.kill(server.child_pids()["llmd.engine"], signal.SIGKILL)
    leave_all(clients)
    dead = wait_for(lambda: figures(server), lambda now: now.num_aborted == before.num_aborted + num_sequences)
    wait_for(lambda: health(server), lambda status: status == b"ok")
    wait_for(lambda: holdings(server), lambda now: now == at_rest)
    assert server.child_pids()["llmd.server"] == pid
    rest = wait_for(lambda: figures(server), lambda now: now.is_idle)
    assert rest.num_computed_tokens == dead.num_computed_tokens
    assert_nothing_is_left(server, rest)
