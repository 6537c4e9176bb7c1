"""The real command, real sockets and the real `openai` package, on a tiny random model."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.end_to_end.running_server import RunningServer, running_server

pytestmark = pytest.mark.slow

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[RunningServer]:
    with running_server("--model", str(tiny_model_dir), "--served-model-name", "tiny", "small/tiny") as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key="EMPTY", max_retries=0)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, seed=1)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_equals_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=40, seed=2)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=40,
            seed=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for entry in logprobs.content:
        # greedy: what was drawn is what is most likely
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert len(entry.top_logprobs) == 3
        assert bytes(entry.bytes or []).decode(errors="replace") == entry.token


def test_completions_of_every_kind_of_prompt(client: openai.OpenAI) -> None:
    one = client.completions.create(model="tiny", prompt="abc", max_tokens=6, temperature=0)
    many = client.completions.create(model="tiny", prompt=["abc", "xyz"], max_tokens=6, temperature=0, n=2)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in many.choices[:2]] == [one.choices[0].text] * 2
    token_ids = httpx.post(f"{client.base_url}".replace("/v1/", "/tokenize"), json={"prompt": "abc"}).json()["tokens"]
    by_ids = client.completions.create(model="tiny", prompt=token_ids, max_tokens=6, temperature=0)
    lists = client.completions.create(model="tiny", prompt=[token_ids, token_ids], max_tokens=6, temperature=0)
    assert [choice.text for choice in (by_ids.choices[0], *lists.choices)] == [one.choices[0].text] * 3


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="hello there", max_tokens=0, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text == "hello there"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:] if value is not None)
    assert "".join(choice.logprobs.tokens) == "hello there"


def test_async_client_many_at_once(server: RunningServer) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="EMPTY", max_retries=0) as client:

            async def ask(seed: int) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=20, seed=seed, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(ask(seed % 8) for seed in range(32)))

    texts = asyncio.run(ask_all())
    # the same seed gives the same text, whoever else runs; other seeds give others
    assert texts[:8] == texts[8:16] == texts[16:24] == texts[24:]
    assert len(set(texts)) == 8


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "small/tiny"]
    assert client.models.retrieve("small/tiny").id == "small/tiny"


def test_errors_are_openai_s(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-17", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x" * 5000)
    assert long.value.code == "context_length_exceeded"
    assert "maximum context length" in str(long.value)


def test_stop_string(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="abc", max_tokens=30, seed=5).choices[0].text
    stop = whole[8:11]
    cut = client.completions.create(model="tiny", prompt="abc", max_tokens=30, seed=5, stop=stop).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_wire_format_of_a_stream(server: RunningServer) -> None:
    with httpx.stream(
        "POST",
        f"{server.base_url}/chat/completions",
        json={"messages": MESSAGES, "max_tokens": 5, "stream": True},
    ) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["x-request-id"]
        body = response.read().decode()
    events = body.split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events[:-2])


def test_health_metrics_and_documentation(server: RunningServer) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert "vllm:generation_tokens_total" in httpx.get(f"{server.url}/metrics").text
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    page = httpx.get(f"{server.url}/docs").text
    # offline: nothing is loaded from elsewhere
    assert 'src="http' not in page
    assert 'href="http' not in page
