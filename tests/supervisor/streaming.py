"""One streamed completion, and what is done to the processes while it runs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer

LONG = {"prompt": "abc", "max_tokens": 300, "seed": 3, "ignore_eos": True}


def completion(server: RunningServer, **parameters: Any) -> str:
    """The text of an answer that nobody disturbs."""
    response = httpx.post(f"{server.base_url}/completions", json={**LONG, **parameters}, timeout=START_TIMEOUT)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def streamed(server: RunningServer, in_the_middle: Callable[[int], None]) -> tuple[str, list[Any]]:
    """The text of LONG as it comes, and the errors among its events. Somewhere in the middle the function is called,
    with the pid of the server process that sends the stream."""
    text, errors, disturbed = "", [], False
    body = {**LONG, "stream": True}
    with httpx.stream("POST", f"{server.base_url}/completions", json=body, timeout=START_TIMEOUT) as response:
        client_port = response.extensions["network_stream"].get_extra_info("client_addr")[1]
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                errors.append(event["error"])
                continue
            text += event["choices"][0]["text"]
            if len(text) > 20 and not disturbed:
                disturbed = True
                in_the_middle(_pid_of_server(server, client_port))
    assert disturbed
    return text, errors


def pids(server: RunningServer, module: str) -> list[int]:
    """All children that run this module, the oldest first."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if module in Path(f"/proc/{pid}/cmdline").read_text().split("\0")]


def _pid_of_server(server: RunningServer, client_port: int) -> int:
    """Whose socket the client's port is connected to."""
    port = int(server.url.rpartition(":")[2])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inode = next(row[9] for row in rows if (_port(row[1]), _port(row[2])) == (port, client_port))
    for pid in pids(server, "llmd.server"):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(fd) == f"socket:[{inode}]":
                return pid
    raise AssertionError("no server process has the client's connection")


def _port(address: str) -> int:
    return int(address.partition(":")[2], 16)
