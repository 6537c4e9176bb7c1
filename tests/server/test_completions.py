"""/v1/completions: shapes, kinds of prompts, echo, the older log-probabilities, and stream against whole."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from openai.types import Completion

from llmd.text.detokenizer import Detokenizer
from tests.server.fake_engine import ANSWER, application, run, say


def test_whole_answer_has_the_documented_shape(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, script=say("Hi!")) as app:
            answer = await app.complete("abc", model="org/tiny")
            Completion.model_validate(answer, strict=True)
            assert answer.pop("id").startswith("cmpl-")
            assert answer.pop("system_fingerprint").startswith("fp_")
            assert isinstance(answer.pop("created"), int)
            assert answer == {
                "object": "text_completion",
                "model": "org/tiny",
                "choices": [
                    {"index": 0, "text": "Hi!", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
                ],
                "usage": {
                    "prompt_tokens": 3,
                    "completion_tokens": 4,
                    "total_tokens": 7,
                    "prompt_tokens_details": {"cached_tokens": 3},
                    "completion_tokens_details": {"reasoning_tokens": 0},
                },
            }

    run(main)


def test_stream_has_the_same_shape_and_ends_with_usage(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, script=say("Hi!")) as app:
            *events, last = await app.stream_completion("abc", stream_options={"include_usage": True})
            assert [event["choices"][0]["text"] for event in events] == ["H", "i", "!", ""]
            assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "stop"]
            assert all(event["object"] == "text_completion" and event["usage"] is None for event in events)
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 4

    run(main)


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("ab", 1), (["ab", "cd", "e"], 3), ([65, 66, 67], 1), ([[65], [66, 67]], 2)],
)
def test_every_kind_of_prompt_gives_n_choices_each(tiny_model_dir: Path, prompt: object, num_prompts: int) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            answer = await app.complete(prompt, n=2, max_tokens=100)
            assert [choice["index"] for choice in answer["choices"]] == list(range(2 * num_prompts))
            texts = [choice["text"] for choice in answer["choices"]]
            assert texts == [f"{ANSWER} (0)", f"{ANSWER} (1)"] * num_prompts
            starts = app.engine.received
            # each prompt once, whatever n is
            assert answer["usage"]["prompt_tokens"] == sum(len(start.prompt_token_ids) for start in starts) // 2
            assert [start.sampling.choice for start in starts] == [0, 1] * num_prompts
            assert len({start.sampling.seed for start in starts}) == 1

    run(main)


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("prompt", ["añ<|im_end|>c", [65, 66]])
def test_echo_gives_the_prompt_back(
    tiny_model_dir: Path, logprobs: int | None, max_tokens: int, prompt: object
) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, script=say("xyz!")) as app:
            fields = {"echo": True, "max_tokens": max_tokens, "logprobs": logprobs}
            whole = (await app.complete(prompt, **fields))["choices"][0]
            shown = prompt if isinstance(prompt, str) else app.engine.tokenizer.decode([65, 66])
            assert whole["text"] == shown + "xyz"[:max_tokens]
            assert whole["finish_reason"] == "length"
            events = await app.stream_completion(prompt, **fields)
            assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]
            if logprobs is None:
                assert whole["logprobs"] is None
                return
            reported = whole["logprobs"]
            num_tokens = len(app.engine.received[0].prompt_token_ids) + max_tokens
            assert all(len(values) == num_tokens for values in reported.values())
            assert reported["token_logprobs"][0] is None
            assert reported["top_logprobs"][0] is None
            assert all(len(top) == max(1, logprobs) for top in reported["top_logprobs"][1:])
            # a token that is a whole character stands where its offset says
            for token, offset in zip(reported["tokens"], reported["text_offset"], strict=True):
                assert token.startswith("bytes:") or whole["text"].startswith(token, offset)
            streamed: dict[str, list[Any]] = {name: [] for name in reported}
            for event in events:
                for name, values in event["choices"][0]["logprobs"].items():
                    streamed[name] += values
            assert streamed == reported

    run(main)


@pytest.mark.parametrize(
    ("prompt", "logprobs", "num_decoded"),
    [("a" * 6000, None, 0), ("a" * 6000, 0, 6000), ([65] * 6000, None, 6000), ([[65] * 3000] * 2, 0, 6000)],
)
def test_an_echo_is_decoded_once_a_prompt_and_beside_the_event_loop(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, prompt: object, logprobs: int | None, num_decoded: int
) -> None:
    """It was decoded in the event loop, once for each of up to 128 choices, even where the text was given."""
    num_pushed: Counter[bool] = Counter()  # by whether it was in the event loop
    push = Detokenizer.push

    def counting(detokenizer: Detokenizer, token_id: int) -> str:
        num_pushed[trio.lowlevel.in_trio_run()] += 1
        return push(detokenizer, token_id)

    async def main() -> None:
        async with application(tiny_model_dir, script=say("xyz!"), max_model_len=8192) as app:
            monkeypatch.setattr(Detokenizer, "push", counting)
            answer = await app.complete(prompt, echo=True, logprobs=logprobs, n=8, max_tokens=2)
            for choice in answer["choices"]:
                assert len(choice["text"]) == (3002 if isinstance(prompt, list) and len(prompt) == 2 else 6002)
                assert choice["text"].endswith("xy")

    run(main, uses_threads=True)
    num_choices = 16 if isinstance(prompt, list) and len(prompt) == 2 else 8
    assert (num_pushed[False], num_pushed[True]) == (num_decoded, 2 * num_choices)


def test_bytes_of_a_split_character_are_spelled_as_openai_does(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, script=say("ö")) as app:
            answer = await app.complete("a", logprobs=1)
            Completion.model_validate(answer, strict=True)
            assert answer["choices"][0]["logprobs"]["tokens"][:2] == ["bytes:\\xc3", "bytes:\\xb6"]
            named = await app.complete("a", logprobs=1, return_tokens_as_token_ids=True)
            assert all(token.startswith("token_id:") for token in named["choices"][0]["logprobs"]["tokens"])

    run(main)


def test_token_ids_on_request(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, script=say("Hi")) as app:
            choice = (await app.complete([65, 66], return_token_ids=True))["choices"][0]
            assert choice["prompt_token_ids"] == [65, 66]
            assert len(choice["token_ids"]) == 3
            events = await app.stream_completion([65, 66], return_token_ids=True)
            choices = [event["choices"][0] for event in events]
            assert choices[0]["prompt_token_ids"] == [65, 66]
            assert [token_id for each in choices for token_id in each["token_ids"]] == choice["token_ids"]

    run(main)


def test_best_of_equal_to_n_asks_for_nothing_more(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            assert len((await app.complete(n=2, best_of=2))["choices"]) == 2

    run(main)


def test_special_tokens_are_shown_only_on_request(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, script=say("a<|im_start|>b")) as app:
            assert (await app.complete())["choices"][0]["text"] == "ab"
            shown = await app.complete(skip_special_tokens=False)
            assert shown["choices"][0]["text"] == "a<|im_start|>b"

    run(main)


def test_a_token_that_the_model_has_no_row_for_is_refused(tiny_model_dir: Path) -> None:
    """A tokenizer may have tokens that were added without a row in the embedding: in a worker they would be fatal."""

    async def main() -> None:
        async with application(tiny_model_dir) as app:
            assert app.server.text is not None
            known, unknown = app.server.text.tokenizer.encode("ab", add_special_tokens=False)
            assert known < unknown
            app.server.text = replace(app.server.text, vocab_size=unknown)
            status, answer = await app.post("/v1/completions", {"prompt": "ab"})
            assert status == 400
            assert answer["error"]["param"] == "prompt.1"
            assert (await app.post("/v1/completions", {"prompt": "aa"}))[0] == 200

    run(main)
