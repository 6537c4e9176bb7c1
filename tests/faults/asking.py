"""Many requests at once to a live server, and what is to be done while their answers come."""

import asyncio
import os
import re
import signal
from collections.abc import Callable, Sequence
from itertools import count

import httpx
from soaking.asking import Answer, ask
from soaking.questions import Body, mixed_questions, streamed

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer

ENGINE, WORKER = "llmd.engine", "llmd.worker"

Request = tuple[str, Body]
OnEvent = Callable[[int], None]

# most of the tiny model's context: many steps where a step has few tokens
LONG_PROMPT = " ".join(f"{number} green bottles" for number in range(30))[:380]


def mixed_requests() -> list[Request]:
    """32 requests of every kind, streamed and not."""
    questions = mixed_questions(num_tokens=40, long_prompt=LONG_PROMPT)
    return [
        (question.path, question.body if number % 3 == 0 else streamed(question.body, continuous_usage=number % 2 == 0))
        for number, question in enumerate((questions * 2)[:32])
    ]


def answers(server: RunningServer, requests: Sequence[Request], on_event: OnEvent = lambda _: None) -> list[Answer]:
    """All answers, asked for at once. `on_event` is told the number of events that all streams together have had."""
    numbers = count(1)

    async def ask_all() -> list[Answer]:
        async with client(server) as http:
            asking = (ask(http, path, body, on_event=lambda _: on_event(next(numbers))) for path, body in requests)
            return await asyncio.gather(*asking)

    return asyncio.run(ask_all())


def client(server: RunningServer) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=server.base_url, timeout=START_TIMEOUT, limits=httpx.Limits(max_keepalive_connections=0)
    )


def send(server: RunningServer, module: str, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send the signal to the process of this module; False if there is none at the moment."""
    pid = server.child_pids().get(module)
    if pid is None:
        return False
    os.kill(pid, number)
    return True


def num_restarts(server: RunningServer) -> int:
    """Of the engine, since the start."""
    restarts: int = httpx.get(f"{server.url}/health").json()["restarts"]
    return restarts


def num_resumed(server: RunningServer) -> float:
    """Sequences that went on in a new engine: without any, a death would have come too late to matter."""
    metrics = httpx.get(f"{server.url}/metrics").text
    return sum(map(float, re.findall(r"^llmd:resumed_requests_total\S* (\S+)$", metrics, re.MULTILINE)))
