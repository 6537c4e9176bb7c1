"""Contract C1: whoever of the engine's side dies, at any moment, every client gets exactly the answer of an undisturbed
run: text, log-probabilities, usage. Real processes; clients see a pause and nothing else."""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer, running_server

pytestmark = pytest.mark.slow

Body = dict[str, Any]
PROMPTS = ("abc", "The quick brown fox", "x" * 200, "1, 2, 3,")


def mixed_requests() -> list[tuple[str, Body]]:
    """32 requests of every kind as (path, body). All seeded: a draw that nobody can repeat cannot be compared."""
    kinds: list[Body] = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "logprobs": 2},
        {"n": 3, "top_k": 20},
        {"echo": True, "logprobs": 1},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "min_tokens": 5},
        {"stop": ["e", "q"], "max_tokens": 150},
        {"repetition_penalty": 1.2, "ignore_eos": True},
    ]
    requests: list[tuple[str, Body]] = []
    for number in range(32):
        body = {
            "max_tokens": 60 + number,
            "seed": number,
            **kinds[number % len(kinds)],
            "stream": number % 3 != 0,
            "return_token_ids": True,
        }
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        prompt = PROMPTS[number % len(PROMPTS)]
        if number % 5 == 4 and "echo" not in body:
            chat = {**body, "messages": [{"role": "user", "content": prompt}], "logprobs": "logprobs" in body}
            requests.append(("/chat/completions", chat))
        else:
            requests.append(("/completions", {**body, "prompt": prompt}))
    return requests


class Answers:
    """All answers of a run, and what is to be done while they come."""

    def __init__(self, server: RunningServer, on_event: Callable[[int], None] = lambda _: None) -> None:
        self._server = server
        self._on_event = on_event
        self._num_events = 0

    def run(self) -> list[Any]:
        return asyncio.run(self._ask_all())

    async def _ask_all(self) -> list[Any]:
        async with httpx.AsyncClient(base_url=self._server.base_url, timeout=START_TIMEOUT) as client:
            return await asyncio.gather(*(self._ask(client, path, body) for path, body in mixed_requests()))

    async def _ask(self, client: httpx.AsyncClient, path: str, body: Body) -> Any:
        """What the client may rely on: each choice's text, tokens, log-probabilities and ending, and the usage."""
        if not body["stream"]:
            response = await client.post(path, json=body)
            assert response.status_code == 200, response.text
            answer = response.json()
            return summary(answer["choices"]), without_cache(answer["usage"])
        parts: list[Body] = []
        usage = None
        done = False
        async with client.stream("POST", path, json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    chunk = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    parts += chunk["choices"]
                    usage = chunk["usage"] or usage
                    self._num_events += 1
                    self._on_event(self._num_events)
        assert done
        return summary(parts), without_cache(usage)


def summary(parts: list[Body]) -> dict[int, Any]:
    """Choice index → everything that its parts say, joined."""
    choices: dict[int, Any] = {}
    for part in parts:
        choice = choices.setdefault(part["index"], {"text": "", "token_ids": [], "logprobs": [], "endings": []})
        message = part.get("message") or part.get("delta") or {}
        choice["text"] += part.get("text") or message.get("content") or ""
        choice["token_ids"] += part.get("token_ids") or []
        choice["logprobs"] += logprobs(part.get("logprobs"))
        if part["finish_reason"] is not None:
            choice["endings"].append((part["finish_reason"], part["stop_reason"]))
    assert all(len(choice["endings"]) == 1 for choice in choices.values())
    return choices


def logprobs(entry: Any) -> list[Any]:
    if entry is None:
        return []
    if "content" in entry:
        return list(entry["content"])
    return list(zip(entry["tokens"], entry["token_logprobs"], entry["top_logprobs"], strict=True))


def without_cache(usage: Any) -> Any:
    """How much of a prompt the cache held is the one thing that a restart may change."""
    return {name: value for name, value in usage.items() if name != "prompt_tokens_details"}


@pytest.fixture
def server(tiny_model_dir: Path) -> Iterator[RunningServer]:
    with running_server("--model", str(tiny_model_dir), "--drain-timeout", "60") as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(tiny_model_dir: Path) -> list[Any]:
    with running_server("--model", str(tiny_model_dir)) as running:
        return Answers(running).run()


def kill(server: RunningServer, module: str) -> bool:
    """Kill -9 the process of this module; False if there is none at the moment."""
    pid = server.child_pids().get(module)
    if pid is None:
        return False
    os.kill(pid, signal.SIGKILL)
    return True


@pytest.mark.parametrize("victim", ["llmd.engine", "llmd.worker"])
@pytest.mark.parametrize("moment", [1, 40, 400])
def test_one_death(server: RunningServer, undisturbed: list[Any], victim: str, moment: int) -> None:
    def on_event(num_events: int) -> None:
        if num_events == moment:
            assert kill(server, victim)

    assert Answers(server, on_event).run() == undisturbed
    assert httpx.get(f"{server.url}/health").json()["restarts"] == 1


def test_several_deaths_in_a_row(server: RunningServer, undisturbed: list[Any]) -> None:
    moments = {30 + 120 * number: ("llmd.engine", "llmd.worker")[number % 2] for number in range(4)}

    def on_event(num_events: int) -> None:
        if num_events in moments:
            kill(server, moments[num_events])

    assert Answers(server, on_event).run() == undisturbed
    assert httpx.get(f"{server.url}/health").json()["restarts"] >= 2


def test_a_death_while_it_restarts(server: RunningServer, undisturbed: list[Any]) -> None:
    async def kill_again() -> None:
        # the next worker says what it does before it can do anything
        await asyncio.to_thread(server.wait_log, "importing torch", occurrences=2)
        assert kill(server, "llmd.worker")

    tasks = []

    def on_event(num_events: int) -> None:
        if num_events == 50:
            tasks.append(asyncio.get_running_loop().create_task(kill_again()))
            kill(server, "llmd.engine")

    assert Answers(server, on_event).run() == undisturbed
    assert httpx.get(f"{server.url}/health").json()["restarts"] >= 2


def test_a_death_while_it_drains(server: RunningServer, undisturbed: list[Any]) -> None:
    def on_event(num_events: int) -> None:
        if num_events == 200:
            server.process.send_signal(signal.SIGTERM)
        elif num_events == 260:
            assert kill(server, "llmd.engine")

    assert Answers(server, on_event).run() == undisturbed
    assert server.process.wait(START_TIMEOUT) == 0
