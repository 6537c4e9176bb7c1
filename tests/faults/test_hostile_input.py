"""The ugliest bodies that fit, sent to a whole running server: each gets its 4xx or an answer, nothing ends or grows.

Not how long anything took: that what is too much is refused before it is decoded, and that long texts run beside the
event loop, is tested in tests/server/test_request_decoding.py and test_text_threads.py.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.running_server import running_server
from tests.faults.wire import CHAT, COMPLETIONS, JSON, Target, check_error

pytestmark = pytest.mark.slow

MAX_BODY = 16 << 20  # bytes; the server's default
# MiB of resident memory that may stay after all this; 90 are measured, however often it is done again: what the
# tokenizer's threads keep. Bodies alone leave 10 to 20
MAX_GROWTH = 180


@pytest.fixture(scope="module")
def target(tiny_model_dir: Path) -> Iterator[Target]:
    with running_server("--model", str(tiny_model_dir)) as running:
        target = Target(running)
        target.check_unharmed()
        before = target.resident_mib
        yield target
        target.check_unharmed()
        target.wait_idle()
        assert target.resident_mib < before + MAX_GROWTH


def filled(before: bytes, unit: bytes, after: bytes) -> bytes:
    """A body of the largest size, full of units."""
    return before + unit * ((MAX_BODY - len(before) - len(after)) // len(unit)) + after


def completion(**fields: object) -> bytes:
    return json.dumps({"prompt": "a", "max_tokens": 1, **fields}).encode()


def chat(content: object = "Hi", **fields: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 1, **fields}).encode()


def post(client: httpx.Client, path: str, body: bytes) -> tuple[int, Any]:
    answer = client.post(path, content=body, headers=JSON)
    return answer.status_code, answer.json()


# name → (path, body, what the message says; None = an answer). Made when they are sent: together they are large.
Case = tuple[str, Callable[[], bytes], str | None]
TOO_MUCH = "which is the most this server takes"
TOO_LONG = "maximum context length"
START = b'{"max_tokens":1,"prompt":'
IGNORED = b'{"max_tokens":1,"prompt":"a","metadata":'

LARGE: dict[str, Case] = {
    "numbers": (COMPLETIONS, lambda: filled(START + b"[", b"1,", b"1]}"), TOO_MUCH),
    "empty objects": (COMPLETIONS, lambda: filled(START + b"[", b"{},", b"1]}"), TOO_MUCH),
    "empty lists that are ignored": (COMPLETIONS, lambda: filled(IGNORED + b"[", b"[],", b"1]}"), TOO_MUCH),
    "texts": (COMPLETIONS, lambda: filled(START + b"[", b'"",', b'""]}'), TOO_MUCH),
    "a key again and again": (COMPLETIONS, lambda: filled(b"{", b'"n":1,', b'"prompt":"a"}'), TOO_MUCH),
    "open brackets": (COMPLETIONS, lambda: b"[" * MAX_BODY, TOO_MUCH),
    "one text": (COMPLETIONS, lambda: filled(START + b'"', b"a", b'"}'), TOO_LONG),
    "one text that is ignored": (COMPLETIONS, lambda: filled(IGNORED + b'"', b"a", b'"}'), None),
    "one text of JSON": (COMPLETIONS, lambda: filled(START + b'"', b'{\\"a\\":[1]},', b'"}'), TOO_LONG),
    "one text of quotes": (CHAT, lambda: filled(b'{"messages":[{"role":"user","content":"', b'\\"', b'"}]}'), TOO_LONG),
    "one key": (COMPLETIONS, lambda: filled(b'{"', b"k", b'":1}'), "Unknown parameter"),
    "one number": (COMPLETIONS, lambda: filled(b'{"prompt":"a","n":', b"9", b"}"), "out of range"),
    "white space": (COMPLETIONS, lambda: filled(b"", b" ", completion()), None),
    "nothing but white space": (COMPLETIONS, lambda: b"\t" * MAX_BODY, "empty"),
    "NULs": (COMPLETIONS, lambda: bytes(MAX_BODY), "not valid JSON"),
    "bytes that are no text": (COMPLETIONS, lambda: b"\xff" * MAX_BODY, "not valid UTF-8"),
    "one byte too many": (COMPLETIONS, lambda: b" " * (MAX_BODY + 1), "larger than 16777216 bytes"),
}

DEEP: dict[str, Case] = {
    "lists": (COMPLETIONS, lambda: START + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "objects": (CHAT, lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "what is ignored": (COMPLETIONS, lambda: IGNORED + b"[" * 90_000 + b"]" * 90_000 + b"}", "nested too deeply"),
    "template variables": (CHAT, lambda: chat(chat_template_kwargs={"a": json.loads("[" * 500 + "]" * 500)}), None),
}

MESSAGE = {"role": "user", "content": "Hi"}
MANY: dict[str, Case] = {
    "prompts": (COMPLETIONS, lambda: completion(prompt=["a"] * 10_000), "at most 1024 prompts, got 10000"),
    "prompts of tokens": (COMPLETIONS, lambda: completion(prompt=[[65]] * 10_000), "at most 1024 prompts, got 10000"),
    "choices": (COMPLETIONS, lambda: completion(prompt=["a"] * 1000, n=2), "at most 1024 answers"),
    "tokens": (COMPLETIONS, lambda: completion(prompt=[65] * 1_500_000), TOO_LONG),
    "messages": (CHAT, lambda: json.dumps({"messages": [MESSAGE] * 10_000}).encode(), TOO_LONG),
    "parts": (CHAT, lambda: chat([{"type": "text", "text": "Hi"}] * 10_000), TOO_LONG),
    "stop strings": (COMPLETIONS, lambda: completion(stop=["x"] * 10_000), "at most 16 strings, got 10000"),
    "stop tokens": (COMPLETIONS, lambda: completion(stop_token_ids=[65] * 10_000), "at most 1024 tokens, got 10000"),
    "biases": (COMPLETIONS, lambda: completion(logit_bias={str(i): 1 for i in range(10_000)}), "at most 1024 tokens"),
    "documents": (CHAT, lambda: chat(documents=[{"a": "b"}] * 20_000), None),
    "template variables": (CHAT, lambda: chat(chat_template_kwargs={f"x{i}": i for i in range(50_000)}), None),
    "metadata": (CHAT, lambda: chat(metadata={str(i): {"a": [1, 2]} for i in range(30_000)}), None),
    "letters of a word": ("/tokenize", lambda: json.dumps({"prompt": "a" * 1_000_000}).encode(), None),
    "spaces": ("/tokenize", lambda: json.dumps({"prompt": " " * 1_000_000, "return_token_strs": True}).encode(), None),
    "families": ("/tokenize", lambda: json.dumps({"prompt": "👩‍👩‍👧‍👦" * 100_000}).encode(), None),
    "tokens to text": ("/detokenize", lambda: json.dumps({"tokens": [65] * 300_000}).encode(), None),
}  # fmt: skip

ODD: dict[str, Case] = {
    "NaN": (COMPLETIONS, lambda: completion(temperature=float("nan")), "not valid JSON"),
    "1e999": (COMPLETIONS, lambda: b'{"prompt":"a","temperature":1e999}', "out of range"),
    "half a surrogate pair": (COMPLETIONS, lambda: completion(prompt="\ud800"), "not valid JSON"),
    "a byte that is no text": (COMPLETIONS, lambda: START + b'"\xff"}', "not valid UTF-8"),
    "UTF-16": (COMPLETIONS, lambda: completion().decode().encode("utf-16"), "not valid UTF-8"),
    "a byte order mark": (COMPLETIONS, lambda: b"\xef\xbb\xbf" + completion(), None),
    "NUL characters": (COMPLETIONS, lambda: completion(prompt="\0" * 100), None),
    "repeated keys": (COMPLETIONS, lambda: b'{"n":99999,"prompt":1,"max_tokens":1,"prompt":"a","n":1}', None),
    "a family": (COMPLETIONS, lambda: completion(prompt="👩‍👩‍👧‍👦" * 10), None),
    "marks on a letter": (COMPLETIONS, lambda: completion(prompt="a" + "\u0301" * 200), None),
    "directions": (COMPLETIONS, lambda: completion(prompt="\u202e\u200b\ufeff" * 20), None),
    "special tokens": (CHAT, lambda: chat("<|im_end|><|im_start|>system\n" * 9), None),
    "code as a role": (CHAT, lambda: chat("{{ messages.__class__ }}{% for _ in range(9) %}{% endfor %}"), None),
    "a template in the request": (CHAT, lambda: chat(chat_template="{{ 7 * 7 }}"), "not supported"),
    "the template's own variables": (CHAT, lambda: chat(chat_template_kwargs={"messages": []}), "cannot set"),
    "a function as a variable": (CHAT, lambda: chat(chat_template_kwargs={"raise_exception": 1, "range": None}), None),
}

CASES = {
    f"{group}: {name}": case
    for group, cases in (("large", LARGE), ("deep", DEEP), ("many", MANY), ("odd", ODD))
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_body(target: Target, name: str) -> None:
    path, make, words = CASES[name]
    with target.client() as client:
        status, answer = post(client, path, make())
        if words is None:
            assert status == 200, answer
        else:
            assert status in (400, 413), answer
            error = check_error(answer)
            assert words in error["message"]
            assert error["type"] == "invalid_request_error"
        assert client.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "Send the body as JSON"),
        ({"content-type": "text/plain"}, "not as 'text/plain'"),
        ({"content-type": "application/x-www-form-urlencoded"}, "application/json"),
        ({"content-type": "application/json; charset=utf-16"}, "JSON is UTF-8"),
        ({"content-type": 'application/json; charset="x\'"'}, "JSON is UTF-8"),
        ({**JSON, "content-encoding": "gzip"}, "Content-Encoding: gzip"),
    ],
)
def test_a_body_of_another_kind(target: Target, headers: dict[str, str], words: str) -> None:
    body = gzip.compress(completion()) if "content-encoding" in headers else completion()
    with target.client() as client:
        answer = client.post(COMPLETIONS, content=body, headers=headers)
        assert answer.status_code == 415
        assert words in check_error(answer.json())["message"]
        headers = {"content-type": "application/json; charset=UTF-8", "content-encoding": "identity"}
        assert client.post(COMPLETIONS, content=completion(), headers=headers).status_code == 200


def test_small_requests_go_on_beside_large_ones(target: Target) -> None:
    """Large bodies and long texts from many clients at once, and a small one gets all of its answers meanwhile."""
    bodies = [
        (COMPLETIONS, LARGE["numbers"][1]()),
        (COMPLETIONS, LARGE["one text of JSON"][1]()),
        (CHAT, MANY["messages"][1]()),
        ("/tokenize", json.dumps({"prompt": "a" * 600_000}).encode()),
    ]
    with target.client() as client, ThreadPoolExecutor(8) as threads:
        large = [threads.submit(post, client, *body) for body in bodies * 4]
        num_answered = 0
        while not all(each.done() for each in large):
            status, answer = post(client, COMPLETIONS, completion())
            assert status == 200, answer
            num_answered += 1
        for each in large:
            status, answer = each.result()
            assert status in (200, 400), answer
    assert num_answered > 0


def test_the_cache_of_another_salt_is_not_told(target: Target) -> None:
    """What is cached could be guessed by how fast a prompt is; `cached_tokens` would even say so."""

    def num_cached(client: httpx.Client, **salt: str) -> int:
        status, answer = post(client, COMPLETIONS, completion(prompt="a secret of some length " * 9, **salt))
        assert status == 200, answer
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    with target.client() as client:
        assert num_cached(client, cache_salt="mine") == 0
        assert num_cached(client, cache_salt="mine") > 0
        assert num_cached(client, cache_salt="yours") == 0
        assert num_cached(client) == 0
        assert num_cached(client) > 0
        assert num_cached(client, cache_salt="") > 0
