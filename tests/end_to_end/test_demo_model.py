"""Real weights in float32: the tokens, probabilities and draws that `transformers` gives, alone and in company."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from tests.end_to_end.prompts import PROMPTS
from tests.end_to_end.running_server import RunningServer, running_server

pytestmark = pytest.mark.slow

NUM_TOKENS = 32


@pytest.fixture(scope="module")
def server(demo_model_dir: Path) -> Iterator[RunningServer]:
    with running_server("--model", str(demo_model_dir), "--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key="EMPTY")


@pytest.fixture(scope="module")
def oracle(demo_model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32)


def token_ids(server: RunningServer, text: str) -> list[int]:
    import httpx

    ids: list[int] = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
    return ids


def greedy_request(prompt: list[int]) -> dict[str, Any]:
    return {
        "model": "default",
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "logprobs": 1,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }


@torch.inference_mode()
def assert_greedy(oracle: Any, prompt: list[int], choice: Any) -> None:
    """Each token is the oracle's most likely one after the same context, which by induction is its greedy answer."""
    output = choice.token_ids
    assert len(output) == NUM_TOKENS
    logits = oracle(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == output
    expected = torch.log_softmax(logits.double(), -1)[range(NUM_TOKENS), output]
    assert (torch.tensor(choice.logprobs.token_logprobs).double() - expected).abs().max() < 1e-3


def test_greedy_alone_and_as_32_at_once(server: RunningServer, client: openai.OpenAI, oracle: Any) -> None:
    prompts = [token_ids(server, text) for text in PROMPTS]
    alone = [client.completions.create(**greedy_request(prompt)).choices[0] for prompt in prompts]
    for prompt, choice in zip(prompts, alone, strict=True):
        assert_greedy(oracle, prompt, choice)

    async def ask_all() -> list[Any]:
        limit = asyncio.Semaphore(32)
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="EMPTY") as many:

            async def ask(prompt: list[int]) -> Any:
                async with limit:
                    return (await many.completions.create(**greedy_request(prompt))).choices[0]

            return await asyncio.gather(*map(ask, prompts))

    # not close, but the same: tokens and, to the last digit, their probabilities
    for single, crowded in zip(alone, asyncio.run(ask_all()), strict=True):
        assert crowded.token_ids == single.token_ids
        assert crowded.logprobs.token_logprobs == single.logprobs.token_logprobs


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "extra_body": {"top_k": 12}},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "extra_body": {"min_p": 0.1}},
        {"temperature": 0.9, "top_p": 0.9, "extra_body": {"top_k": 30, "min_p": 0.02}},
    ],
    ids=str,
)
def test_draws_follow_the_exact_probabilities(
    server: RunningServer, client: openai.OpenAI, oracle: Any, parameters: dict[str, Any]
) -> None:
    prompt = token_ids(server, "My favourite animal is the")
    body = {**parameters.get("extra_body", {}), "return_token_ids": True}
    drawn: Counter[int] = Counter()
    for seed in range(8):
        answer = client.completions.create(
            model="default", prompt=prompt, max_tokens=1, n=128, seed=seed, **{**parameters, "extra_body": body}
        )
        drawn.update(choice.token_ids[0] for choice in answer.choices)  # type: ignore[attr-defined]
    with torch.inference_mode():
        logits = oracle(torch.tensor([prompt])).logits[0, -1].double()
    probabilities = filtered(logits, {"top_p": parameters.get("top_p", 1.0), **body}, parameters["temperature"])
    total = sum(drawn.values())
    assert all(probabilities[token] > 0 for token in drawn)
    # tokens too rare for the approximation are one cell together
    cells = [token for token in range(len(probabilities)) if probabilities[token] * total >= 5]
    observed = [drawn[token] for token in cells]
    expected = [float(probabilities[token]) * total for token in cells]
    rest = total - sum(expected)
    if rest > 1e-6 * total:
        observed.append(total - sum(observed))
        expected.append(rest)
    # seeds are fixed, so this passes always or never
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def filtered(logits: torch.Tensor, parameters: dict[str, Any], temperature: float) -> torch.Tensor:
    """The exact distribution that is to be drawn from, [vocab] float64."""
    probabilities = torch.softmax(logits / temperature, -1)
    if top_k := parameters.get("top_k"):
        probabilities[probabilities < probabilities.topk(top_k).values[-1]] = 0
        probabilities /= probabilities.sum()
    if parameters["top_p"] < 1:
        ordered, ids = probabilities.sort(descending=True)
        probabilities[ids[(ordered.cumsum(-1) - ordered) >= parameters["top_p"]]] = 0
        probabilities /= probabilities.sum()
    if min_p := parameters.get("min_p"):
        probabilities[probabilities < min_p * probabilities.max()] = 0
        probabilities /= probabilities.sum()
    return probabilities


def test_same_seed_same_text_whatever_runs_beside_it(server: RunningServer, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Tell me a short story about a fox."}]

    def story() -> str | None:
        answer = client.chat.completions.create(model="default", messages=messages, max_tokens=24, seed=7)  # type: ignore[arg-type]
        return answer.choices[0].message.content

    alone = story()

    async def crowded() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="EMPTY") as many:

            async def ask(index: int) -> str:
                beside = [{"role": "user", "content": f"Count to {index} and back. " * (index + 1)}]
                answer = await many.chat.completions.create(
                    model="default",
                    messages=messages if index % 3 == 0 else beside,  # type: ignore[arg-type]
                    max_tokens=24,
                    seed=7 if index % 3 == 0 else index,
                )
                return answer.choices[0].message.content or ""

            return await asyncio.gather(*map(ask, range(12)))

    assert set(asyncio.run(crowded())[::3]) == {alone}


def test_chat_makes_sense(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=20,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
