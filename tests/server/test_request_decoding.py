"""Bodies of any size and shape: what is too much is refused before it is decoded, what is real gets through."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd.errors import InvalidRequest
from llmd.server import request_decoding
from llmd.server.openai_types import ChatCompletionRequest, CompletionRequest
from llmd.server.request_decoding import MAX_ITEMS, MAX_PARTS, decode_request

TOO_MANY = "which is the most this server takes"
CODE = "if (a[i] == {1, 2, \"x\"}) { b[i] += '\\\\'; }\n"


def completion(prompt: bytes) -> bytes:
    return b'{"prompt":' + prompt + b"}"


def in_list(item: bytes, count: int) -> bytes:
    return completion(b"[" + b",".join([item] * count) + b"]")


# --- what is too much


@pytest.mark.parametrize(
    "body",
    [
        in_list(b"1", MAX_ITEMS + 2),
        in_list(b"{}", MAX_PARTS),
        in_list(b"[]", MAX_PARTS),
        in_list(b'""', MAX_PARTS),
        in_list(b'"\\""', MAX_PARTS),
        in_list(b'"\\\\"', MAX_PARTS),
        completion(b"[" * MAX_PARTS + b"]" * MAX_PARTS),
        b"[" * (MAX_PARTS + 1),
        b'{"":' * MAX_PARTS,
        b'{"prompt":"a","metadata":' + in_list(b'{"a":1}', MAX_PARTS) + b"}",
        b'{"prompt":"a"' + b',"n":1' * MAX_PARTS + b"}",
    ],
    ids=lambda body: body[:40],
)
def test_too_many_values_are_refused_before_they_are_decoded(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*arguments: object, **options: object) -> object:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(msgspec.json, "decode", decode)
    with pytest.raises(InvalidRequest, match=TOO_MANY):
        decode_request(body, CompletionRequest)


@pytest.mark.parametrize(
    "body",
    [
        in_list(b"32000", MAX_ITEMS),
        in_list(b'"a"', MAX_PARTS - 3),
        completion(json.dumps(CODE * 99_999).encode()),
        completion(b'"' + b"\\\\" * 1_000_000 + b'"'),
        completion(b'"' + b'\\"' * 1_000_000 + b'"'),
        completion(b'"' + b"[{,:" * 1_000_000 + b'"'),
    ],
    ids=lambda body: body[:40],
)  # fmt: skip
def test_real_prompts_of_any_size_get_through(body: bytes) -> None:
    """Token ids of the largest contexts, and texts that are full of what would count outside of them."""
    assert decode_request(body, CompletionRequest).prompt == json.loads(body)["prompt"]


# --- counting

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a,[]{}:"\\/\n\0é👋'), max_size=9),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from('b,{"\\'), max_size=5), inner),
    max_leaves=30,
)


def extent(value: Any) -> tuple[int, int]:
    """Commas, and texts, keys, lists and objects, worked out from the value."""
    if isinstance(value, str):
        return 0, 1
    if not isinstance(value, list | dict):
        return 0, 0
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    items, parts = map(sum, zip((0, 0), *map(extent, inner), strict=True))
    return items + max(0, len(value) - 1), parts + 1


@given(VALUES, st.booleans())
def test_what_stands_in_texts_does_not_count(value: Any, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert request_decoding._extent(body) == extent(value)


# --- what is skipped over


def test_what_is_ignored_is_not_built() -> None:
    nested = b"[" * 500 + b"]" * 500
    body = b'{"prompt":"a","user":' + nested + b',"metadata":{"a":1e999},"store":' + b"9" * 9999 + b"}"
    assert decode_request(body, CompletionRequest).prompt == "a"


@pytest.mark.parametrize("name", ["user", "metadata", "prompt"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b'"\xff"', "not valid UTF-8: invalid start byte at byte"),
        (b'"\xed\xa0\x80"', "not valid UTF-8"),
        (b'"\\ud800"', "not valid JSON"),
        (b'"\\x"', "not valid JSON"),
        (b"NaN", "not valid JSON"),
        (b"[1,]", "not valid JSON"),
        (b"01", "not valid JSON"),
        (b"[" * 50_000 + b"]" * 50_000, "nested too deeply"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
    ],
)
def test_what_is_ignored_must_still_be_json(name: str, value: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        decode_request(b'{"%b":%b}' % (name.encode(), value), CompletionRequest)


@pytest.mark.parametrize("value", [b"1e999", b'"' + b"x" * 1000 + b'"', b"[" + b"[]," * 900 + b"1]"])
def test_a_refused_field_of_any_value_is_named(value: bytes) -> None:
    with pytest.raises(InvalidRequest, match="'suffix' is not supported"):
        decode_request(b'{"prompt":"a","suffix":%b}' % value, CompletionRequest)


def test_nulls_and_repeated_keys() -> None:
    body = b' {"prompt": "a", "n": 2 , "n": null,"temperature":null, "\\u0070rompt":"b","tools":null,"user":null}'
    request = decode_request(body, CompletionRequest)
    assert (request.prompt, request.n, request.temperature) == ("b", 1, None)


def test_the_first_unknown_key_is_enough() -> None:
    body = b'{"messages":[],' + b",".join(b'"x%d":1' % number for number in range(MAX_PARTS - 3)) + b"}"
    with pytest.raises(InvalidRequest, match="Unknown parameter: 'x0'"):
        decode_request(body, ChatCompletionRequest)
