"""Whatever a client sends: an answer, or a 4xx with the four-key error object; and nothing stays open behind it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmd.server.openai_types import IGNORED, REFUSED, ChatCompletionRequest, CompletionRequest
from tests.server.fake_engine import Answered, Application, application, parse_events, run, say

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")

BAD_BODIES: list[tuple[bytes, str]] = [
    (b"", "empty"),
    (b"  ", "empty"),
    (b"{", "not valid JSON"),
    (b"nope", "not valid JSON"),
    (b"{} {}", "not valid JSON"),
    (b"[]", "must be a JSON object"),
    (b"null", "must be a JSON object"),
    (b'"text"', "must be a JSON object"),
    (b'{"temperature": NaN}', "not valid JSON"),
    (b'{"temperature": Infinity}', "not valid JSON"),
    (b'{"temperature": 1e999}', ""),
    (b'{"n": ' + b"9" * 5000 + b"}", ""),
    (b'{"n": ' + b"9" * 400 + b"}", ""),
    (b'{"user": "\xff\xfe"}', "not valid UTF-8"),
    (b'{"user": "\xed\xa0\x80"}', "not valid UTF-8"),
    (b'{"user": "\\ud800"}', "not valid JSON"),
    (b'{"user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    (json.dumps({"x" * 100_000: 1}).encode(), "Unknown parameter"),
    (b'{"": 1}', "Unknown parameter"),
]


def assert_refused(status: int, answer: Any) -> dict[str, Any]:
    assert 400 <= status < 500, answer
    assert answer.keys() == {"error"}
    error: dict[str, Any] = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 1000
    return error


@pytest.mark.parametrize("path", PATHS)
def test_what_is_no_request_is_a_400(tiny_model_dir: Path, path: str) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            for body, words in BAD_BODIES:
                status, answer = await app.post_bytes(path, body)
                assert status == 400, body[:50]
                assert words in assert_refused(status, answer)["message"], (body[:50], answer)
            assert app.engine.received == []

    run(main)


def test_content_types(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            body = b'{"prompt": "a"}'
            for content_type in ("application/json", "Application/JSON; charset=utf-8", "application/x+json"):
                assert (await app.post_bytes("/v1/completions", body, content_type))[0] == 200
            for content_type in ("", "text/plain", "application/x-www-form-urlencoded", "json"):
                status, answer = await app.post_bytes("/v1/completions", body, content_type)
                assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")

    run(main)


def test_a_byte_order_mark_is_no_part_of_the_request(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            assert (await app.post_bytes("/v1/completions", b'\xef\xbb\xbf{"prompt": "a"}'))[0] == 200

    run(main)


def test_of_a_repeated_key_the_last_counts(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            assert (await app.post_bytes("/v1/completions", b'{"prompt": "a", "n": 0, "n": 1}'))[0] == 200

    run(main)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, 2, -1, 64, 0.5, 1.0, 1e-320, 1e300, -0.0])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.sampled_from(
        ["", "user", "assistant", "system", "tool", "text", "tiny", "EMPTY", "auto", "<|im_end|>", "\x00"]
    )
)
NESTED_KEYS = st.sampled_from(
    ["role", "content", "type", "text", "name", "function", "arguments", "tool_calls", "include_usage", "1", "x"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NESTED_KEYS, inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]) | SCALARS},
        optional={"content": SCALARS | VALUES, "tool_calls": VALUES, "name": SCALARS},
    ),
    max_size=3,
)
FIELDS = sorted({*ChatCompletionRequest.__struct_fields__, *CompletionRequest.__struct_fields__, *IGNORED, *REFUSED})
RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.just([{"role": "user", "content": "Hi"}]),
    "prompt": st.sampled_from(["Hi", ["a", "b"], [65, 66], [[65], [66]]]),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(1, 9),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.1, 1),
    "stream": st.booleans(),
    "stop": st.sampled_from(["o", ["k", "x"]]),
    "logprobs": st.sampled_from([True, 1]),
    "logit_bias": st.just({"65": 1}),
    "echo": st.booleans(),
    "seed": st.integers(-(2**63), 2**63 - 1),
}
WRONG = {"messages": MESSAGES | VALUES, "prompt": st.text(max_size=5) | st.lists(st.integers(-1, 300)) | VALUES}


@st.composite
def bodies(draw: st.DrawFn, *, required: str) -> dict[str, Any]:
    """Objects that are nearly requests: right keys, and values that are often wrong."""
    fields = draw(st.lists(st.sampled_from([*RIGHT, *FIELDS]), max_size=3, unique=True))
    body = {}
    for field in (required, *fields):
        wrong = WRONG.get(field, VALUES)
        body[field] = draw(st.one_of(RIGHT[field], RIGHT[field], wrong) if field in RIGHT else wrong)
    # so that a right one is soon over
    body.setdefault("max_tokens", 3)
    return body


@pytest.mark.parametrize(("path", "required"), [(PATHS[0], "messages"), (PATHS[1], "prompt")])
def test_structured_garbage_is_answered_or_refused(tiny_model_dir: Path, path: str, required: str) -> None:
    num_answered = 0

    @settings(
        max_examples=20,
        deadline=None,
        phases=[Phase.generate, Phase.explicit],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(bodies(required=required), min_size=20, max_size=20))
    def check(examples: list[dict[str, Any]]) -> None:
        async def main() -> None:
            nonlocal num_answered
            async with application(tiny_model_dir, script=say("ok")) as app:
                for body in examples:
                    answered = await ask(app, path, body)
                    num_answered += answered.status == 200
                    assert app.server.engine.num_open == 0
                await app.engine.wait_until(lambda: not app.engine.open)

        run(main)

    check()
    # the garbage is good: some of it gets through
    assert num_answered > 5


async def ask(app: Application, path: str, body: dict[str, Any]) -> Answered:
    answered = await app.request("POST", path, json.dumps(body).encode(), content_type="application/json")
    if answered.status != 200:
        assert_refused(answered.status, json.loads(answered.body))
    elif body.get("stream"):
        assert not any("error" in event for event in parse_events(bytes(answered.body)))
    return answered
