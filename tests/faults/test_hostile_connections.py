"""Connections that hold on, stall, break off or are too many, against a whole running server: the others are served,
and what they took comes back."""

import json
import re
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.running_server import running_server
from tests.faults.wire import COMPLETIONS, Target, many_connections, say

pytestmark = pytest.mark.slow

KEY = "sk-let-me-in"
MIB = 1 << 20
IDLE_TIMEOUT = 3  # seconds
# MiB of resident memory that may stay after all this; about 25 are measured
MAX_GROWTH = 100


@pytest.fixture(scope="module")
def target(tiny_model_dir: Path) -> Iterator[Target]:
    allow_files(4096)
    arguments = ("--model", str(tiny_model_dir), "--api-key", KEY, "--keep-alive-timeout", str(IDLE_TIMEOUT))
    with running_server(*arguments) as running:
        target = Target(running, {"authorization": f"Bearer {KEY}"})
        target.check_unharmed()
        memory, num_files = target.resident_mib, target.num_files
        yield target
        target.check_unharmed()
        target.wait_idle()
        target.wait_files(num_files + 1)
        assert target.resident_mib < memory + MAX_GROWTH


def allow_files(count: int) -> None:
    """To this process, which has the other end of every connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


def head(path: str, *headers: str, key: str | None = KEY, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    return "\r\n".join([*lines, "", ""]).encode()


def post(path: str, body: object, *headers: str) -> bytes:
    data = json.dumps(body).encode()
    return head(path, f"Content-Length: {len(data)}", *headers) + data


def reset(connection: socket.socket) -> None:
    """Close so that the server gets an RST instead of a FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_headers_that_trickle_in_are_not_waited_for(target: Target) -> None:
    """Each byte alone would be in time; the whole is not, and the connection is closed, whatever comes in."""
    with many_connections(target, 20) as connections:
        num_bytes = [0] * len(connections)
        is_open = set(range(len(connections)))
        data = b"GET /version HTTP/1.1\r\nHost: x\r\nX-Slow: " + b"z" * 8000
        while is_open:
            for index in sorted(is_open):
                try:
                    connections[index].settimeout(0.005)
                    connections[index].sendall(data[num_bytes[index] : num_bytes[index] + 1])
                    num_bytes[index] += 1
                    closed = connections[index].recv(1) == b""
                except TimeoutError:
                    closed = False
                except (ConnectionResetError, BrokenPipeError):
                    closed = True
                if closed:
                    is_open.discard(index)
            target.check_unharmed()
        assert max(num_bytes) < len(data)


def test_many_half_sent_requests(target: Target) -> None:
    num_files = target.num_files
    whole = post(COMPLETIONS, {"prompt": "a", "max_tokens": 1, "user": "x" * 100_000})
    with many_connections(target, 100) as connections:
        for index, connection in enumerate(connections):
            connection.sendall(whole[: (index + 1) * len(whole) // 101])
        target.check_unharmed()
        # it was no different for those that go on
        for connection in connections[1::10]:
            index = connections.index(connection)
            connection.sendall(whole[(index + 1) * len(whole) // 101 :])
            assert connection.recv(12) == b"HTTP/1.1 200"
    target.wait_files(num_files)
    target.wait_idle()


def test_a_thousand_idle_connections(target: Target) -> None:
    num_files = target.num_files
    with many_connections(target, 1000) as connections:
        target.check_unharmed()
        # of its own accord the server closes what stays idle
        assert all(connection.recv(1) == b"" for connection in connections)
        target.check_unharmed()
    target.wait_files(num_files)


def test_readers_that_stop(target: Target) -> None:
    """Answers of many megabytes that nobody takes: one writer waits for each, and hears that its client is gone."""
    num_files = target.num_files
    request = post("/detokenize", {"tokens": [3] * 400_000})
    with many_connections(target, 8) as connections:
        for connection in connections:
            connection.sendall(request)
        for connection in connections:
            # it has begun, and cannot go on
            assert connection.recv(12) == b"HTTP/1.1 200"
        target.check_unharmed()
        for connection in connections[::2]:
            reset(connection)
    target.wait_files(num_files)


def test_pipelines_that_break_off(target: Target) -> None:
    request = post(COMPLETIONS, {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True})
    with many_connections(target, 40) as connections:
        for index, connection in enumerate(connections):
            connection.sendall(request * (1 + index % 7) + request[: index * 7])
        for connection in connections[::4]:
            assert connection.recv(1)
        for connection in connections:
            reset(connection)
    target.wait_idle()
    target.check_unharmed()


CONFLICTS = {
    "length and chunks": head(COMPLETIONS, "Content-Length: 4", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "chunks and length": head(COMPLETIONS, "Transfer-Encoding: chunked", "Content-Length: 4") + b"0\r\n\r\n",
    "two lengths": head(COMPLETIONS, "Content-Length: 4", "Content-Length: 5") + b"{}  ",
    "a list of lengths": head(COMPLETIONS, "Content-Length: 4, 5") + b"{}  ",
    "a length below zero": head(COMPLETIONS, "Content-Length: -1"),
    "a length of letters": head(COMPLETIONS, "Content-Length: 0x10") + bytes(16),
    "a length without end": head(COMPLETIONS, "Content-Length: " + "9" * 5000),
    "chunks twice": head(COMPLETIONS, "Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n",
    "chunks and something else": head(COMPLETIONS, "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
    "a chunk of no size": head(COMPLETIONS, "Transfer-Encoding: chunked") + b"zz\r\n",
    "a chunk below zero": head(COMPLETIONS, "Transfer-Encoding: chunked") + b"-5\r\nabcde\r\n",
    "a chunk larger than a number": head(COMPLETIONS, "Transfer-Encoding: chunked") + b"f" * 400 + b"\r\n",
    "a space before the colon": head(COMPLETIONS, "Content-Length : 2") + b"{}",
    "a header without a name": head(COMPLETIONS, ": x"),
    "a NUL in a header": head(COMPLETIONS, "X: a\0b"),
    "a bare line feed": head(COMPLETIONS, "X: a\nContent-Length: 2") + b"{}",
    "too many headers": head(COMPLETIONS, *(f"X-{number}: {'y' * 50}" for number in range(2000))),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_what_could_be_read_in_two_ways_is_not_read(target: Target, name: str) -> None:
    answers = say(target, CONFLICTS[name])
    # never more than one, so that nobody's next request is another one's
    assert len(answers) <= 1
    for answer in answers:
        assert 400 <= answer.status < 500 or answer.status == 501, answer
        answer.check()
    target.check_unharmed()


def test_who_has_no_key_is_refused_before_anything_is_read(target: Target) -> None:
    """At once, and what it sends nevertheless is not kept."""
    before = target.resident_mib
    target.forget_most_resident()
    request = head(COMPLETIONS, f"Content-Length: {16 * MIB}", key=None)
    with many_connections(target, 30) as connections:
        for connection in connections:
            connection.sendall(request)
        for connection in connections:
            assert connection.recv(13) == b"HTTP/1.1 401 "
            connection.settimeout(0.5)
            try:
                for _ in range(16):
                    connection.sendall(b"x" * MIB)
            except OSError:
                pass  # closed, or taken no more
    # of 480 MiB that were sent
    assert target.most_resident_mib < before + 100
    target.check_unharmed()


def test_more_connections_than_files(target: Target) -> None:
    """Accepting fails for a while: it must neither spin nor end the listener. Who is in already is served."""
    limits = resource.prlimit(target.pid, resource.RLIMIT_NOFILE)
    with target.client() as client:
        assert client.get("/health/live").status_code == 200
        try:
            resource.prlimit(target.pid, resource.RLIMIT_NOFILE, (target.num_files + 5, limits[1]))
            with many_connections(target, 100) as connections:
                # they lie in the backlog; one that was accepted before any of them is served
                for _ in range(20):
                    assert client.get("/health/live").status_code == 200
                assert client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code == 200
                for connection in connections[::2]:
                    reset(connection)
            target.check_unharmed()
        finally:
            resource.prlimit(target.pid, resource.RLIMIT_NOFILE, limits)
    target.check_unharmed()


def test_the_server_may_have_as_many_files_as_this_user(target: Target) -> None:
    limits = Path(f"/proc/{target.pid}/limits").read_text()
    soft, hard = re.findall(r"Max open files\s+(\S+)\s+(\S+)", limits)[0]
    assert soft == hard
