"""Every answer has its name, every log line the name of its request, and the access log a line for every request."""

import json
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from llmd.config import HttpConfig, LogConfig
from llmd.server.api_keys import key_digest
from llmd.text.tokenizer import Tokenizer
from tests.server.fake_engine import Answered, Application, application, run
from tests.server.live import http_request, live_server, read_until, reset
from tests.server.logged import Logged, logged

JSON = "application/json"
CHAT = "/v1/chat/completions"
KEY = "sk-marker"
DOORS = HttpConfig(api_key_digests=(key_digest(KEY),), allowed_origins=("https://page.example",), max_body_bytes=20_000)
AUTHORIZED = {"authorization": f"Bearer {KEY}"}
ACCESS = LogConfig(access_log=True)

Ask = Callable[[Application, dict[str, str]], Awaitable[Answered]]


def ask(method: str, path: str, body: object = None, **given: Any) -> Ask:
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()

    async def do(running: Application, headers: dict[str, str]) -> Answered:
        sent = {**headers, **given.get("headers", AUTHORIZED)}
        return await running.request(method, path, data, content_type=given.get("content_type", JSON), headers=sent)

    return do


HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
ANSWERS = {
    "whole": (200, ask("POST", CHAT, HELLO)),
    "stream": (200, ask("POST", CHAT, {**HELLO, "stream": True})),
    "head": (200, ask("HEAD", "/health")),
    "preflight": (
        204,
        ask(
            "OPTIONS",
            CHAT,
            headers={"origin": "https://page.example", "access-control-request-method": "POST"},
        ),
    ),
    "no JSON": (400, ask("POST", CHAT, b"{")),
    "no key": (401, ask("POST", CHAT, HELLO, headers={})),
    "no route": (404, ask("GET", "/nowhere")),
    "no method": (405, ask("DELETE", CHAT)),
    "too large": (413, ask("POST", CHAT, b"x" * 30_000)),
    "no type": (415, ask("POST", CHAT, HELLO, content_type="text/plain")),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_every_answer_has_its_name_and_its_line(kind: str, tiny_model_dir: Path) -> None:
    status, do = ANSWERS[kind]

    async def main() -> None:
        async with application(tiny_model_dir, http=DOORS, log=ACCESS) as running:
            with logged() as log:
                named = await do(running, {"x-request-id": "trace-1"})
                unnamed = await do(running, {})
            assert named.status == unnamed.status == status
            assert named.headers[b"x-request-id"] == b"trace-1"
            made = unnamed.headers[b"x-request-id"].decode()
            assert made.startswith("req_")
            first, second = log.with_message("answered")
            assert (first["request_id"], second["request_id"]) == ("trace-1", made)
            assert first["status"] == status
            assert first["bytes"] == len(named.body)
            assert first["duration_ms"] >= 0

    run(main)


def test_a_failure_outside_of_the_routes_has_its_name_too(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: object) -> None:
        raise KeyError("marker")

    async def main() -> None:
        async with application(tiny_model_dir, log=ACCESS) as running:
            monkeypatch.setitem(running.app.after_request_funcs, None, [fail])
            with logged() as log:
                answered = await running.request("GET", "/version", headers={"x-request-id": "trace-1"})
            assert answered.status == 500
            assert answered.headers[b"x-request-id"] == b"trace-1"
            assert log.with_message("answered")[0]["status"] == 500
            assert {line.get("request_id") for line in log.lines} == {"trace-1"}

    run(main)


def test_what_a_thread_logs_has_the_name(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Tokenizer.encode

    def encode_and_say(self: Tokenizer, text: str, **options: bool) -> list[int]:
        logging.getLogger("llmd.test").info("in %s", threading.current_thread() is threading.main_thread())
        return encode(self, text, **options)

    async def main() -> None:
        async with application(tiny_model_dir) as running:
            monkeypatch.setattr(Tokenizer, "encode", encode_and_say)
            with logged() as log:
                body = json.dumps({"prompt": "x" * 10_000}).encode()
                headers = {"x-request-id": "trace-1"}
                answered = await running.request("POST", "/tokenize", body, content_type=JSON, headers=headers)
            assert answered.status == 200
            assert [line["request_id"] for line in log.with_message("in False")] == ["trace-1"]

    run(main, uses_threads=True)


def test_names_do_not_mix(tiny_model_dir: Path) -> None:
    """Many at a time, streamed and not: each line of the log has the name that the client of that answer was told."""
    clients = [f"client-{number}" for number in range(20)]

    async def main() -> None:
        async with application(tiny_model_dir, log=ACCESS) as running:
            with logged() as log:
                async with trio.open_nursery() as nursery:
                    for number, name in enumerate(clients):
                        body = json.dumps({"prompt": "x" * (number + 1), "stream": number % 2 == 0}).encode()
                        nursery.start_soon(ask_named, running, name, body)
            lines = log.with_message("answered")
            assert {line["request_id"]: line["prompt_tokens"] for line in lines} == {
                name: number + 1 for number, name in enumerate(clients)
            }

    async def ask_named(running: Application, name: str, body: bytes) -> None:
        headers = {"x-request-id": name}
        await running.request("POST", "/v1/completions", body, content_type=JSON, headers=headers)

    run(main)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_line_says_what_the_engine_did(stream: bool, tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, http=DOORS, log=ACCESS) as running:
            with logged() as log:
                body = {"prompt": "abc", "n": 2, "max_tokens": 4, "stream": stream}
                await ask("POST", "/v1/completions", body)(running, {})
            (line,) = log.with_message("answered")
            assert (line["method"], line["path"], line["client"]) == ("POST", "/v1/completions", "")
            assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 8)
            assert line["finish_reasons"] == ["length", "length"]
            assert 0 <= line["queue_ms"] <= line["first_token_ms"] <= line["duration_ms"]
            assert line["key"] == key_digest(KEY).hex()[:16]

    run(main)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_leaves_is_a_499(stream: bool, tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, log=ACCESS, stall_after=3) as running:
            gone = trio.Event()
            body = json.dumps({"prompt": "abc", "stream": stream}).encode()
            with logged() as log:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(leave_after_token, running, gone)
                    await running.request("POST", "/v1/completions", body, content_type=JSON, gone=gone)
            assert not log.with_message("answered")
            (line,) = log.with_message("499 client left")
            assert line["status"] == 499
            assert line["completion_tokens"] == 3
            assert line["finish_reasons"] == ["abort"]

    async def leave_after_token(running: Application, gone: trio.Event) -> None:
        await running.engine.wait_until(lambda: bool(running.engine.received))
        # the clock jumps when everything that can be said is said
        await trio.sleep(1)
        gone.set()

    run(main)


def test_over_a_socket_the_client_has_an_address(tiny_model_dir: Path) -> None:
    """A real connection: a query is not logged, and a reset is seen."""

    async def main() -> None:
        async with (
            application(tiny_model_dir, log=ACCESS, stall_after=1) as running,
            live_server(running.app) as server,
        ):
            with logged(logging.INFO) as log:
                async with await server.connect() as client:
                    host, port = client.socket.getsockname()
                    await client.send_all(http_request("/version?q=marker"))
                    await read_until(client, b"}")
                    await until_logged(log, "answered")
                    (line,) = log.with_message("answered")
                    assert (line["client"], line["path"]) == (f"{host}:{port}", "/version")
                    await client.send_all(http_request("/v1/completions", {"prompt": "x", "stream": True}))
                    await read_until(client, b"data: ")
                    reset(client)
                    await until_logged(log, "499 client left")
            assert "marker" not in "".join(log.text)

    run(main, uses_threads=True)


async def until_logged(log: Logged, message: str) -> None:
    with trio.fail_after(10):
        while not log.with_message(message):
            await trio.sleep(0.005)


def test_no_access_log_unless_asked(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as running:
            with logged() as log:
                await running.chat()
            assert log.lines == []

    run(main)


def test_requests_are_logged_if_asked_and_cut(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, log=LogConfig(requests=True, max_len=12)) as running:
            with logged() as log:
                await running.chat(max_tokens=5, messages=[{"role": "user", "content": "what is it?" + "x" * 300}])
                await running.complete("abc" * 10, temperature=0, max_tokens=5)
                await running.complete(["ab", "cd"], max_tokens=5)
                await running.complete([65, 66], max_tokens=5)
            requests = log.with_message("request")
            assert [line["prompt"] for line in requests] == [
                "user: what i…",
                "abcabcabcabc…",
                "['ab', 'cd']",
                "[65, 66]",
            ]
            assert all(line["parameters"].startswith('{"') for line in requests)
        async with application(tiny_model_dir, log=LogConfig(requests=True)) as running:
            with logged() as log:
                await running.complete("abc", temperature=0, max_tokens=5)
            (line,) = log.with_message("request")
            assert json.loads(line["parameters"]) == {"temperature": 0.0, "max_tokens": 5}

    run(main)
