"""Every field is honoured or refused (contract C5), and docs/openai.md says which: the tables here, there and in the
code are the same."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmd.protocol.generation import SamplingParams
from llmd.server.openai_types import IGNORED, REFUSED, ChatCompletionRequest, CompletionRequest
from tests.server.fake_engine import Application, application, end_token, run, say

DOCUMENT = Path(__file__).parents[2] / "docs" / "openai.md"
PATHS = ("/v1/chat/completions", "/v1/completions")
MESSAGES = [{"role": "user", "content": "Hi"}]

# field → value → what the engine is told
REACHES_THE_ENGINE: list[tuple[str, Any, dict[str, Any]]] = [
    ("n", 2, {"choice": 1}),
    ("max_tokens", 7, {"max_tokens": 7}),
    ("min_tokens", 2, {"min_tokens": 2}),
    ("temperature", 0.25, {"temperature": 0.25}),
    ("temperature", 1e-9, {"temperature": 0.0}),
    ("top_p", 0.5, {"top_p": 0.5}),
    ("top_k", 9, {"top_k": 9}),
    ("top_k", -1, {"top_k": 0}),
    ("min_p", 0.125, {"min_p": 0.125}),
    ("seed", 11, {"seed": 11}),
    ("seed", -1, {"seed": 2**63 - 1}),
    ("stop_token_ids", [65], {"stop_token_ids": (65, 257, 259)}),
    ("ignore_eos", True, {"stop_token_ids": ()}),
    ("presence_penalty", 0.5, {"presence_penalty": 0.5}),
    ("frequency_penalty", -0.5, {"frequency_penalty": -0.5}),
    ("repetition_penalty", 1.5, {"repetition_penalty": 1.5}),
    ("logit_bias", {"65": -100, "66": 2.5}, {"logit_bias": {65: -100.0, 66: 2.5}}),
]

# fields whose effect is on the answer, and the test that shows it
SHOWN_ELSEWHERE = {
    "model": "test_model_names",
    "stream": "test_chat.test_chunks_come_in_the_documented_order",
    "stream_options": "test_chat.test_continuous_usage_grows_to_the_final_one",
    "stop": "test_chat.test_stream_says_what_the_whole_answer_says",
    "include_stop_str_in_output": "test_chat.test_stream_says_what_the_whole_answer_says",
    "logprobs": "test_chat.test_logprobs_of_stream_and_whole_are_the_same",
    "top_logprobs": "test_chat.test_logprobs_of_stream_and_whole_are_the_same",
    "skip_special_tokens": "test_completions.test_special_tokens_are_shown_only_on_request",
    "add_special_tokens": "test_fields_that_shape_the_prompt",
    "priority": "test_priority_and_salt_reach_the_engine",
    "cache_salt": "test_priority_and_salt_reach_the_engine",
    "timeout": "test_overload.test_a_deadline_in_the_middle_ends_with_what_there_is",
    "return_token_ids": "test_chat.test_token_ids_on_request",
    "return_tokens_as_token_ids": "test_chat.test_token_ids_on_request",
    "messages": "test_chat.test_messages_reach_the_template",
    "max_completion_tokens": "test_chat.test_stream_says_what_the_whole_answer_says",
    "add_generation_prompt": "test_chat.test_messages_reach_the_template",
    "continue_final_message": "test_chat.test_messages_reach_the_template",
    "chat_template_kwargs": "test_fields_that_shape_the_prompt",
    "documents": "test_fields_that_shape_the_prompt",
    "reasoning_effort": "test_fields_that_shape_the_prompt",
    "prompt": "test_completions.test_every_kind_of_prompt_gives_n_choices_each",
    "echo": "test_completions.test_echo_gives_the_prompt_back",
    "best_of": "test_completions.test_best_of_equal_to_n_asks_for_nothing_more",
}


def documented(*headings: str) -> list[str]:
    """The fields in the first column of the tables under these headings."""
    sections = re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.M)[1:]
    chosen = [section for section in sections if section.partition("\n")[0] in headings]
    assert len(chosen) == len(headings)
    return [field for section in chosen for field in re.findall(r"^\| `(\w+)` \|", section, flags=re.M)]


def test_the_document_lists_every_field_once() -> None:
    both, chat, completions = (
        documented("Supported by both"),
        documented("Supported by chat completions"),
        documented("Supported by completions"),
    )
    assert sorted(both + chat) == sorted(ChatCompletionRequest.__struct_fields__)
    assert sorted(both + completions) == sorted(CompletionRequest.__struct_fields__)
    assert sorted(documented("Ignored")) == sorted(IGNORED)
    assert sorted(documented("Refused")) == sorted(REFUSED)


def test_every_supported_field_has_a_test_of_its_effect() -> None:
    tested = {field for field, _, _ in REACHES_THE_ENGINE} | SHOWN_ELSEWHERE.keys()
    assert tested == {*ChatCompletionRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
    here = Path(__file__).parent
    for name in SHOWN_ELSEWHERE.values():
        module, _, function = name.rpartition(".")
        source = here / f"{module or Path(__file__).stem}.py"
        assert f"def {function}(" in source.read_text(encoding="utf-8")


def body_for(path: str, **fields: object) -> dict[str, object]:
    return {"messages": MESSAGES, **fields} if "chat" in path else {"prompt": "Once", **fields}


async def refused(app: Application, path: str, body: dict[str, object], *, status: int = 400) -> dict[str, Any]:
    answered = await app.post(path, body)
    assert answered[0] == status, (body, answered)
    assert answered[1].keys() == {"error"}
    error: dict[str, Any] = answered[1]["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize("path", PATHS)
def test_sampling_fields_reach_the_engine(tiny_model_dir: Path, path: str) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            for field, value, told in REACHES_THE_ENGINE:
                status, answer = await app.post(path, body_for(path, **{field: value}))
                assert status == 200, answer
                sampling: SamplingParams = app.engine.received[-1].sampling
                assert {name: getattr(sampling, name) for name in told} == told, field

    run(main)


@pytest.mark.parametrize("path", PATHS)
def test_defaults_are_openais_unless_the_operator_asks_for_the_models(tiny_model_dir: Path, path: str) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            await app.post(path, body_for(path))
            await app.post(path, body_for(path, temperature=None, top_p=None, stop=None, n=None))
            first, second = (request.sampling for request in app.engine.received)
            assert first.seed != second.seed
            num_prompt_tokens = len(app.engine.received[0].prompt_token_ids)
            for sampling in (first, second):
                assert sampling == SamplingParams(
                    max_tokens=app.engine.max_model_len - num_prompt_tokens if "chat" in path else 16,
                    seed=sampling.seed,
                    stop_token_ids=(257, 259),
                )
        async with application(tiny_model_dir, sampling_defaults={"temperature": 0.5, "top_k": 3}) as app:
            await app.post(path, body_for(path, top_k=4))
            sampling = app.engine.received[0].sampling
            assert (sampling.temperature, sampling.top_k) == (0.5, 4)

    run(main)


# what is out of range: fields → the field that the error names → a part of its message
OUT_OF_RANGE: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 0}, "n", "n must be at least 1, got 0."),
    ({"n": 129}, "n", "n must be at most 128, got 129."),
    ({"temperature": -0.1}, "temperature", "temperature must be in [0, 2], got -0.1."),
    ({"temperature": 2.1}, "temperature", "temperature must be in [0, 2], got 2.1."),
    ({"top_p": 0}, "top_p", "top_p must be in (0, 1], got 0.0."),
    ({"top_k": -2}, "top_k", "top_k must be 0 (disable), or at least 1, got -2."),
    ({"min_p": 1.5}, "min_p", "min_p must be in [0, 1], got 1.5."),
    ({"presence_penalty": 3}, "presence_penalty", "presence_penalty must be in [-2, 2], got 3.0."),
    ({"frequency_penalty": -3}, "frequency_penalty", "frequency_penalty must be in [-2, 2], got -3.0."),
    ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty must be greater than zero, got 0.0."),
    ({"repetition_penalty": 1e300}, "repetition_penalty", "repetition_penalty must be in [0.01, 100]"),
    ({"min_tokens": -1}, "min_tokens", "min_tokens must be greater than or equal to 0, got -1."),
    (
        {"min_tokens": 9, "max_tokens": 3},
        "min_tokens",
        "min_tokens must be less than or equal to max_tokens=3, got 9.",
    ),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0."),
    ({"max_tokens": 513}, "max_tokens", "max_tokens=513 cannot be greater than max_model_len=512."),
    ({"max_tokens": 511}, "max_tokens", "maximum context length is 512 tokens"),
    ({"max_tokens": 10**40}, "max_tokens", "cannot be greater than max_model_len=512"),
    ({"timeout": 0}, "timeout", "timeout must be greater than zero, got 0.0."),
    ({"timeout": "1"}, "timeout", "expected `float | null`, got `str`"),
    ({"seed": 2**63}, "seed", "seed must be a 64-bit integer"),
    ({"priority": 2**31}, "priority", "priority must be a 32-bit integer"),
    ({"stop": ""}, "stop", "stop cannot contain an empty string."),
    ({"stop": ["a", ""]}, "stop", "stop cannot contain an empty string."),
    ({"stop": ["a"] * 17}, "stop", "stop can hold at most 16 strings, got 17."),
    ({"stop": "x" * 1025}, "stop", "at most 1024 characters"),
    ({"stop_token_ids": [264]}, "stop_token_ids", "not in the vocabulary of 264 tokens"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "not in the vocabulary"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias contains key(s) that cannot be converted to integer"),
    ({"logit_bias": {"264": 1}}, "logit_bias", "not in the vocabulary"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "logit_bias values must be in [-100, 100], got 101.0."),
    ({"stream_options": {}}, "stream_options", "Stream options can only be defined when `stream=True`."),
    ({"cache_salt": "x" * 129}, "cache_salt", "cache_salt can have at most 128 characters."),
    ({"temperature": "hot"}, "temperature", "expected `float | null`, got `str`"),
    ({"n": 1.5}, "n", "expected `int`, got `float`"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "expected `bool"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unknown parameter: 'stream_options.x'."),
    ({"stop": [1]}, "stop.0", "expected `str`, got `int`"),
    ({"temprature": 1}, "temprature", "Unknown parameter: 'temprature'. Did you mean 'temperature'?"),
    ({"max_length": 5}, "max_length", "Unknown parameter: 'max_length'."),
    ({"model": 5}, "model", "expected `str | null`, got `int`"),
]
CHAT_OUT_OF_RANGE: list[tuple[dict[str, Any], str, str]] = [
    ({"top_logprobs": 2}, "top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true."),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "Requested sample logprobs of 21, which is greater than"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "top_logprobs must be non-negative, got -1."),
    ({"logprobs": 1}, "logprobs", "expected `bool`, got `int`"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens must be at least 1, got 0."),
    ({"max_completion_tokens": 512}, "max_completion_tokens", "maximum context length is 512 tokens"),
    ({"continue_final_message": True}, "continue_final_message", "Cannot set both `continue_final_message` and"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "cannot set 'messages'"),
    ({"messages": None}, "messages", "Missing required parameter: 'messages'."),
    ({"messages": []}, "messages", "must have at least one message"),
    ({"messages": "Hi"}, "messages", "expected `array`, got `str`"),
    ({"messages": [{"content": "Hi"}]}, "messages.0.role", "Missing required parameter: 'messages.0.role'."),
    ({"messages": [{"role": "king", "content": "Hi"}]}, "messages.0.role", "'king'"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "must have content"),
    ({"messages": [*MESSAGES, {"role": "user", "content": 5}]}, "messages.1.content", "got `int`"),
    ({"messages": [{"role": "user", "content": "", "mood": "good"}]}, "messages.0.mood", "Unknown parameter"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0.type",
        "'image_url' is not supported",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages.0.content.0.text",
        "Missing required parameter: 'messages.0.content.0.text'.",
    ),
    (
        {"messages": [{"role": "user", "content": "x" * 600}]},
        "messages",
        "This model's maximum context length is 512 tokens. However, your messages resulted in",
    ),
    ({"echo": True}, "echo", "Unknown parameter: 'echo'."),
]
COMPLETIONS_OUT_OF_RANGE: list[tuple[dict[str, Any], str, str]] = [
    ({"logprobs": 21}, "logprobs", "Requested sample logprobs of 21, which is greater than max allowed: 20"),
    ({"logprobs": True}, "logprobs", "expected `int | null`, got `bool`"),
    ({"prompt": None}, "prompt", "Missing required parameter: 'prompt'."),
    ({"prompt": []}, "prompt", "please provide at least one prompt"),
    ({"prompt": ""}, "prompt", "at least one token"),
    ({"prompt": [[]]}, "prompt", "at least one token"),
    ({"prompt": ["a", 1]}, "prompt", "not a mixture"),
    ({"prompt": [1.5]}, "prompt.0", "got `float`"),
    ({"prompt": [264]}, "prompt.0", "not in the vocabulary of 264 tokens"),
    ({"prompt": [[1], [-1]]}, "prompt.1.0", "not in the vocabulary"),
    ({"prompt": ["a"] * 1025}, "prompt", "at most 1024 prompts, got 1025"),
    ({"prompt": ["a"] * 9, "n": 128}, "n", "at most 1024 answers (prompts times n), got 1152"),
    ({"prompt": "x" * 513}, "prompt", "This model's maximum context length is 512 tokens. However, your prompt"),
    ({"prompt": "x" * 512}, "prompt", "maximum context length"),
    ({"best_of": 2}, "best_of", "supported only where it equals n"),
    ({"n": 3, "best_of": 2}, "best_of", "best_of must be greater than or equal to n, got n=3 and best_of=2."),
    ({"echo": True, "max_tokens": -1}, "max_tokens", "max_tokens must be at least 0, got -1."),
]


@pytest.mark.parametrize(
    ("path", "cases"),
    [
        (PATHS[0], OUT_OF_RANGE + CHAT_OUT_OF_RANGE),
        (PATHS[1], OUT_OF_RANGE + COMPLETIONS_OUT_OF_RANGE),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(
    tiny_model_dir: Path, path: str, cases: list[tuple[dict[str, Any], str, str]]
) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            for fields, param, words in cases:
                error = await refused(app, path, body_for(path, **fields))
                assert error["param"] == param, (fields, error)
                assert words in error["message"], (fields, error)
            assert app.engine.received == []

    run(main)


def test_a_prompt_that_does_not_fit_has_the_code_that_agents_know(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            for path in PATHS:
                long = "x" * 600
                message = {"role": "user", "content": long}
                body: dict[str, object] = {"messages": [message]} if "chat" in path else {"prompt": long}
                assert (await refused(app, path, body))["code"] == "context_length_exceeded"
            # the longest prompts that fit: one token of answer, or none
            answer = await app.complete("x" * 511, max_tokens=1)
            assert answer["usage"]["total_tokens"] == 512
            assert (await app.complete("x" * 512, max_tokens=0, echo=True))["choices"][0]["text"] == "x" * 512

    run(main)


def test_ignored_fields_are_accepted_and_change_nothing(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            for path in PATHS:
                await app.post(path, body_for(path, seed=1))
                await app.post(path, body_for(path, seed=1, **{field: {"any": ["value"]} for field in IGNORED}))
                plain, ignoring = app.engine.received[-2:]
                assert plain.sampling == ignoring.sampling
                assert plain.prompt_token_ids == ignoring.prompt_token_ids

    run(main)


def test_refused_fields_are_refused_unless_they_ask_for_nothing(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            for path in PATHS:
                for field, harmless in REFUSED.items():
                    for value in (None, *harmless):
                        status, answer = await app.post(path, body_for(path, **{field: value}))
                        assert status == 200, (field, value, answer)
                    for value in ({"type": "function"}, 1, False in harmless):
                        error = await refused(app, path, body_for(path, **{field: value}))
                        assert (error["param"], error["code"]) == (field, "unsupported_parameter")

    run(main)


@pytest.mark.parametrize("path", PATHS)
def test_model_names(tiny_model_dir: Path, path: str) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            for name in (None, "", "EMPTY", "default", "tiny"):
                status, answer = await app.post(path, body_for(path, model=name))
                assert (status, answer["model"]) == (200, "tiny")
            assert (await app.post(path, body_for(path, model="org/tiny")))[1]["model"] == "org/tiny"
            error = await refused(app, path, body_for(path, model="gpt-4"), status=404)
            assert error["message"] == "The model `gpt-4` does not exist. This server has: `tiny`, `org/tiny`."
            assert (error["param"], error["code"]) == ("model", "model_not_found")

    run(main)


def test_priority_and_salt_reach_the_engine(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            await app.chat(priority=-5, cache_salt="mine")
            assert (app.engine.received[0].priority, app.engine.received[0].cache_salt) == (-5, "mine")

    run(main)


def test_fields_that_shape_the_prompt(tiny_model_dir: Path, tmp_path: Path) -> None:
    """With a template that shows its variables, and a tokenizer that puts a token in front."""
    for source in tiny_model_dir.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"add_bos_token": True, "chat_template": "{{ [mood, reasoning_effort, documents] | tojson }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    async def main() -> None:
        async with application(tmp_path, script=say("x")) as app:
            decode = app.engine.tokenizer.decode
            fields = {"chat_template_kwargs": {"mood": "glad"}, "reasoning_effort": "low", "documents": [{"a": 1}]}
            await app.chat(**fields)
            await app.chat(**fields, add_special_tokens=True)
            await app.complete("a")
            await app.complete("a", add_special_tokens=False)
            prompts = [decode(request.prompt_token_ids, skip_special_tokens=False) for request in app.engine.received]
            assert json.loads(prompts[0]) == ["glad", "low", [{"a": 1}]]
            assert prompts[1:] == ["<|begin|>" + prompts[0], "<|begin|>a", "a"]
            assert end_token(app.engine.tokenizer) in app.engine.received[0].sampling.stop_token_ids

    run(main)
