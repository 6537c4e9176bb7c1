"""/v1/chat/completions: shapes, chunk order, and that a stream says what the whole answer says."""

from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from llmd.config import HttpConfig
from tests.server.fake_engine import ANSWER, Application, application, run, say


def test_whole_answer_has_the_documented_shape(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, script=say("Hi!")) as app:
            answer = await app.chat(model="tiny")
            prompt_tokens = answer["usage"]["prompt_tokens"]
            assert prompt_tokens == len(app.engine.received[0].prompt_token_ids)
            ChatCompletion.model_validate(answer, strict=True)
            assert answer.pop("id").startswith("chatcmpl-")
            assert answer.pop("system_fingerprint").startswith("fp_")
            assert isinstance(answer.pop("created"), int)
            assert answer == {
                "object": "chat.completion",
                "model": "tiny",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "Hi!", "refusal": None, "reasoning_content": None},
                        "logprobs": None,
                        "finish_reason": "stop",
                        "stop_reason": None,
                    }
                ],
                "usage": {
                    "prompt_tokens": prompt_tokens,
                    "completion_tokens": 4,
                    "total_tokens": prompt_tokens + 4,
                    "prompt_tokens_details": {"cached_tokens": 3},
                    "completion_tokens_details": {"reasoning_tokens": 0},
                },
                "service_tier": "default",
            }

    run(main)


def test_chunks_come_in_the_documented_order(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, script=say("Hi")) as app:
            events = await app.stream_chat(model="tiny", stream_options={"include_usage": True})
            for event in events:
                ChatCompletionChunk.model_validate(event, strict=True)
            assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
            *chunks, last = [
                {key: event[key] for key in event if key not in ("id", "created", "system_fingerprint")}
                for event in events
            ]
            common = {"object": "chat.completion.chunk", "model": "tiny", "usage": None}
            choice = {"index": 0, "logprobs": None, "finish_reason": None}
            role = {"role": "assistant", "content": "", "refusal": None}
            end = {"finish_reason": "stop", "stop_reason": None}
            assert chunks == [
                {**common, "choices": [{**choice, "delta": role}]},
                {**common, "choices": [{**choice, "delta": {"content": "H"}}]},
                {**common, "choices": [{**choice, "delta": {"content": "i"}}]},
                {**common, "choices": [{**choice, "delta": {}, **end}]},
            ]
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 3

    run(main)


def test_without_include_usage_every_event_has_a_choice_and_no_usage(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            for options in ({}, {"stream_options": {"include_usage": False, "include_obfuscation": False}}):
                events = await app.stream_chat(**options)
                assert all(event["choices"] and "usage" not in event for event in events)

    run(main)


def test_continuous_usage_grows_to_the_final_one(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            options = {"include_usage": True, "continuous_usage_stats": True}
            events = await app.stream_chat(stream_options=options)
            counts = [event["usage"]["completion_tokens"] for event in events]
            assert counts == sorted(counts)
            assert counts[0] >= 1
            assert counts[-1] == len(ANSWER.encode()) + len(" (0)") + 1

    run(main)


def test_role_is_the_operators(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, http=HttpConfig(response_role="bot")) as app:
            assert (await app.chat())["choices"][0]["message"]["role"] == "bot"
            assert (await app.stream_chat())[0]["choices"][0]["delta"]["role"] == "bot"

    run(main)


def by_index(events: list[Any]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
    return texts


@pytest.mark.parametrize("tokens_per_event", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3},
        {"stop": "answer"},
        {"stop": ["zzz", "wör"], "include_stop_str_in_output": True},
        {"stop": "👋", "min_tokens": 5},
        {"max_tokens": 9, "ignore_eos": True},
        {"max_completion_tokens": 12},
    ],
)
def test_stream_says_what_the_whole_answer_says(
    tiny_model_dir: Path, tokens_per_event: int, fields: dict[str, Any]
) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, tokens_per_event=tokens_per_event) as app:
            whole = await app.chat(**fields, seed=1)
            events = await app.stream_chat(**fields, seed=1, stream_options={"include_usage": True})
            assert by_index(events) == {each["index"]: each["message"]["content"] for each in whole["choices"]}
            ends = {
                choice["index"]: (choice["finish_reason"], choice["stop_reason"])
                for event in events
                for choice in event["choices"]
                if choice["finish_reason"]
            }
            assert ends == {each["index"]: (each["finish_reason"], each["stop_reason"]) for each in whole["choices"]}
            assert events[-1]["usage"] == whole["usage"]

    run(main)


def test_logprobs_of_stream_and_whole_are_the_same(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, script=say("ö!")) as app:
            whole = await app.chat(logprobs=True, top_logprobs=2)
            ChatCompletion.model_validate(whole, strict=True)
            content = whole["choices"][0]["logprobs"]["content"]
            assert [entry["bytes"] for entry in content[:3]] == [[0xC3], [0xB6], [0x21]]
            assert all(len(entry["top_logprobs"]) == 2 for entry in content)
            assert content[0]["logprob"] == content[0]["top_logprobs"][0]["logprob"] == -0.5
            events = await app.stream_chat(logprobs=True, top_logprobs=2)
            parts = [event["choices"][0]["logprobs"] for event in events]
            assert [entry for part in parts if part for entry in part["content"]] == content
            assert len(content) == whole["usage"]["completion_tokens"]

    run(main)


def test_token_ids_on_request(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, script=say("Hi")) as app:
            whole = await app.chat(return_token_ids=True)
            assert whole["prompt_token_ids"] == app.engine.received[0].prompt_token_ids
            assert len(whole["choices"][0]["token_ids"]) == 3
            events = await app.stream_chat(return_token_ids=True)
            choices = [event["choices"][0] for event in events]
            assert choices[0]["prompt_token_ids"] == whole["prompt_token_ids"]
            streamed = [token_id for choice in choices for token_id in choice.get("token_ids", [])]
            assert streamed == whole["choices"][0]["token_ids"]
            named = await app.chat(logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)
            tokens = [entry["token"] for entry in named["choices"][0]["logprobs"]["content"]]
            assert tokens == [f"token_id:{token_id}" for token_id in streamed]

    run(main)


def prompt_of(app: Application) -> str:
    tokenizer = app.server.loaded_text().tokenizer
    return tokenizer.decode(app.engine.received[-1].prompt_token_ids, skip_special_tokens=False)


def test_messages_reach_the_template(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            messages: list[dict[str, Any]] = [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "42"},
            ]
            await app.chat(messages=messages)
            assert prompt_of(app) == (
                "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
                "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
            )
            # what we answered can come back as it is
            answer = await app.chat(messages=messages[:2])
            await app.chat(messages=[*messages[:2], answer["choices"][0]["message"], messages[1]])
            await app.chat(messages=messages[:1], add_generation_prompt=False)
            assert prompt_of(app) == "<|im_start|>system\nBe brief.<|im_end|>\n"
            final = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "The answer"}]
            await app.chat(messages=final, add_generation_prompt=False, continue_final_message=True)
            assert prompt_of(app).endswith("<|im_start|>assistant\nThe answer")

    run(main)
