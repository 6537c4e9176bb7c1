"""Deaths of the engine at moments that need a special look: in the middle of a prompt, after one choice has ended, and
under requests that nobody can repeat because their seed is the server's own."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from soaking.asking import Answer, ask
from soaking.questions import Body, streamed
from tokenizers import Tokenizer

from tests.end_to_end.running_server import RunningServer, running_server
from tests.faults.asking import (
    ENGINE,
    LONG_PROMPT,
    WORKER,
    answers,
    client,
    num_restarts,
    num_resumed,
    send,
)
from tests.faults.facts import figures, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a name for each row of its embedding, so that all it says can be said to it again."""
    from make_tiny_model import make_tiny_model

    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    num_rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<|{number}|>" for number in range(tokenizer.get_vocab_size(), num_rows)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[RunningServer]:
    # a long prompt takes two dozen steps here
    with running_server("--model", str(model_dir), "--max-num-batched-tokens", "16", "--max-num-seqs", "16") as running:
        yield running


def test_prompts_that_are_being_computed(server: RunningServer) -> None:
    """They begin anew, and nobody can tell."""
    parameters = {"max_tokens": 8, "seed": 1, "logprobs": 1, "return_token_ids": True}
    prompts = [f"{number} {LONG_PROMPT}" for number in range(16)]

    def salted(salt: str) -> list[tuple[str, Body]]:
        # the second run is not to find in the cache what the first has computed
        return [("/completions", streamed({**parameters, "prompt": prompt, "cache_salt": salt})) for prompt in prompts]

    undisturbed = answers(server, salted("first"))
    restarts, resumed = num_restarts(server), num_resumed(server)
    wait_for(lambda: figures(server).cache_usage, lambda usage: usage == 0)
    num_events_at_death = []
    num_events = 0

    def kill_in_the_middle() -> None:
        # the first of them hold blocks
        wait_for(lambda: figures(server).cache_usage, lambda usage: usage > 0)
        assert send(server, ENGINE)
        num_events_at_death.append(num_events)

    def count_event(_: object) -> None:
        nonlocal num_events
        num_events += 1

    async def ask_all() -> list[Answer]:
        async with client(server) as http:
            killing = asyncio.create_task(asyncio.to_thread(kill_in_the_middle))
            asking = (ask(http, path, body, on_event=count_event) for path, body in salted("second"))
            all_answers = await asyncio.gather(*asking)
            await killing
            return all_answers

    assert asyncio.run(ask_all()) == undisturbed
    assert num_restarts(server) == restarts + 1
    # the death came while most of them had not said a word
    assert num_resumed(server) > resumed + 8
    assert all(answer.usage["prompt_tokens"] > 350 for answer in undisturbed)
    assert num_events_at_death[0] < 8 * 8


def test_one_of_several_choices_has_ended(server: RunningServer) -> None:
    """What has ended is not begun again, and what has not goes on."""
    body = streamed(
        {
            "prompt": "abc",
            "n": 6,
            "seed": 5,
            "stop": ["e", "q", "5", "z", "K"],
            "max_tokens": 120,
            "logprobs": 1,
            "return_token_ids": True,
        }
    )
    request = ("/completions", body)
    [undisturbed] = answers(server, [request])
    restarts, resumed = num_restarts(server), num_resumed(server)
    has_died = False

    def on_event(chunk: Body) -> None:
        nonlocal has_died
        if not has_died and any(choice["finish_reason"] for choice in chunk["choices"]):
            has_died = send(server, WORKER)

    async def ask_one() -> Answer:
        async with client(server) as http:
            return await ask(http, *request, on_event=on_event)

    assert asyncio.run(ask_one()) == undisturbed
    assert num_restarts(server) == restarts + 1
    assert 0 < num_resumed(server) - resumed < 6


def test_requests_without_a_seed(server: RunningServer) -> None:
    """No run can be compared with another. But the model itself says how likely each token was after all before it: one
    token twice, or one missing, and nothing behind that place would fit."""
    body = streamed(
        {"prompt": "Once upon a time", "max_tokens": 60, "n": 2, "logprobs": 0, "return_token_ids": True},
        continuous_usage=True,
    )
    moments = {30: ENGINE, 500: WORKER}
    restarts, resumed = num_restarts(server), num_resumed(server)

    def on_event(num_events: int) -> None:
        if num_events in moments:
            assert send(server, moments[num_events])

    given = answers(server, [("/completions", {**body, "ignore_eos": True})] * 8, on_event)
    assert num_restarts(server) == restarts + len(moments)
    assert num_resumed(server) >= resumed + 16 + 1
    texts = set()
    for answer in given:
        assert answer.usage["completion_tokens"] == 2 * 60
        for choice in answer.choices.values():
            assert len(choice["token_ids"]) == 60
            assert scores(server, body["prompt"], choice["token_ids"]) == [row[1] for row in choice["logprobs"]]
            texts.add(choice["text"])
    # each has a seed of its own
    assert len(texts) == 16


def scores(server: RunningServer, prompt: str, token_ids: list[int]) -> list[Any]:
    """The model's log-probability of each of these tokens after the prompt and those before it."""
    prompt_ids = httpx.post(f"{server.url}/tokenize", json={"prompt": prompt}).json()["tokens"]
    body = {"prompt": prompt_ids + token_ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    echoed = httpx.post(f"{server.base_url}/completions", json=body, timeout=60)
    assert echoed.status_code == 200, echoed.text
    logprobs: list[Any] = echoed.json()["choices"][0]["logprobs"]["token_logprobs"]
    return logprobs[len(prompt_ids) :]
