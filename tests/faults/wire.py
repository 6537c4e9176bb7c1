"""A real server under attack: bytes to it as they are, what it says as a strict client reads it, and what it holds."""

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
# after so much silence of the server it is told that no more comes
PATIENCE = 0.2

JSON = {"content-type": "application/json"}

_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) [\x20-\x7e]*")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\t]*)")


class NotHttp(AssertionError):
    """The server said what no client can understand."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def check(self) -> None:
        """It is a success, or a failure of the client's with OpenAI's error object."""
        assert self.status < 500 or self.status == 501 or self.status == 505, self
        if self.status >= 400 and self.body:
            check_error(json.loads(self.body))


def check_error(answer: Any) -> dict[str, Any]:
    assert answer.keys() == {"error"}, answer
    error: dict[str, Any] = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) < 2000
    return error


def read_answers(data: bytes, *, is_complete: bool = True) -> list[Answer]:
    """The answers to one connection's requests. `is_complete` False: the last one may be cut short."""
    answers = []
    while data:
        head, separator, rest = data.partition(b"\r\n\r\n")
        if not separator:
            if is_complete:
                raise NotHttp(data)
            break
        answer, rest = _read_answer(head, rest)
        if answer is None:
            if is_complete:
                raise NotHttp(data)
            break
        if answer.status >= 200:
            answers.append(answer)
        data = rest
    return answers


def _read_answer(head: bytes, rest: bytes) -> tuple[Answer | None, bytes]:
    """The answer of this head and what follows it; None if its body is cut short."""
    first, *lines = head.split(b"\r\n")
    matched = _STATUS_LINE.fullmatch(first)
    headers = {}
    for line in lines:
        header = _HEADER.fullmatch(line)
        if header is None:
            raise NotHttp(line)
        headers[header[1].decode().lower()] = header[2].decode()
    if matched is None:
        raise NotHttp(first)
    status = int(matched[1])
    body: bytes | None = b""
    if status >= 200:
        if headers.get("transfer-encoding") == "chunked":
            body, rest = _read_chunks(rest)
        elif (length := int(headers["content-length"])) <= len(rest):
            body, rest = rest[:length], rest[length:]
        else:
            # an answer to HEAD has the length of what it does not have
            body, rest = (b"", rest) if not rest else (None, rest)
    return None if body is None else Answer(status, headers, body), rest


def _read_chunks(data: bytes) -> tuple[bytes | None, bytes]:
    body = b""
    while True:
        line, separator, data = data.partition(b"\r\n")
        if not separator:
            return None, data
        size = int(line, 16)
        if len(data) < size + 2:
            return None, data
        if data[size : size + 2] != b"\r\n":
            raise NotHttp(data[:40])
        body, data = body + data[:size], data[size + 2 :]
        if size == 0:
            return body, data


@dataclass
class Target:
    """One server process of a running command, seen from outside."""

    running: RunningServer
    headers: dict[str, str] = field(default_factory=dict)  # of every request, as for an API key
    pid: int = field(init=False)

    def __post_init__(self) -> None:
        self.pid = self.running.child_pids()["llmd.server"]

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.running.url)
        assert url.port is not None
        return url.host, url.port

    def connect(self, *, timeout: float = START_TIMEOUT) -> socket.socket:
        return socket.create_connection(self.address, timeout=timeout)

    def client(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.running.url, timeout=START_TIMEOUT, headers=self.headers, **settings)

    @property
    def resident_mib(self) -> float:
        return self._status("VmRSS")

    @property
    def most_resident_mib(self) -> float:
        return self._status("VmHWM")

    def forget_most_resident(self) -> None:
        """`most_resident_mib` begins again with what there is now (Linux: proc(5), clear_refs)."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def _status(self, name: str) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) / 1024

    @property
    def num_files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def check_unharmed(self) -> None:
        """It is the same process, and it answers."""
        assert self.running.child_pids()["llmd.server"] == self.pid, self.running.log
        with self.client() as client:
            answer = client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1})
            assert answer.status_code == 200, answer.text

    def wait_idle(self) -> None:
        """No sequence is open and every block is free. Fails after a time that is a guard only."""
        with self.client() as client:
            client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).raise_for_status()
            for _ in range(10_000):
                metrics = client.get("/metrics").text
                if all(_gauge(metrics, name) == 0 for name in _IDLE_AT_ZERO):
                    return
        raise AssertionError(metrics)

    def wait_files(self, most: int) -> None:
        """Until the process has so few files open. Fails after a time that is a guard only."""
        end = time.monotonic() + START_TIMEOUT
        while (num_files := self.num_files) > most:
            assert time.monotonic() < end, num_files
            time.sleep(0.01)


_IDLE_AT_ZERO = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def _gauge(metrics: str, name: str) -> float:
    values = re.findall(rf"^{name}\{{.*\}} (\S+)$", metrics, re.M)
    assert values, f"{name} is not there"
    return sum(map(float, values))


def say(target: Target, data: bytes) -> list[Answer]:
    """All that the server answers to these bytes. If it waits for more, it is told that there is no more."""
    received = b""
    is_complete = True
    with target.connect(timeout=PATIENCE) as connection:
        try:
            connection.sendall(data)
            while True:
                try:
                    chunk = connection.recv(1 << 16)
                except TimeoutError:
                    if not is_complete:
                        continue
                    is_complete = False
                    connection.shutdown(socket.SHUT_WR)
                    continue
                if not chunk:
                    break
                received += chunk
        except (ConnectionResetError, BrokenPipeError):
            is_complete = False
    return read_answers(received, is_complete=is_complete)


@contextmanager
def many_connections(target: Target, count: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as connections:
        yield [connections.enter_context(target.connect()) for _ in range(count)]
