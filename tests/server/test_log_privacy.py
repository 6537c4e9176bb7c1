"""Unless asked, no log at any level has a prompt, an answer, a header's value or an API key, whatever goes wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmd.config import HttpConfig, LogConfig
from llmd.server import chat
from llmd.server.api_keys import key_digest
from tests.server.fake_engine import Answered, Application, application, run, say
from tests.server.live import http_request, live_server
from tests.server.logged import Logged, logged

MARKER = "sq7MARKER7qs"
HEADERS = {
    "authorization": f"Bearer sk-{MARKER}",
    "cookie": f"session={MARKER}",
    "user-agent": MARKER,
    "x-request-timeout": "100",
}
HTTP = HttpConfig(api_key_digests=(key_digest(f"sk-{MARKER}"),), max_body_bytes=50_000)
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": MARKER}]

BAD_BODIES: list[Any] = [
    {"messages": MESSAGES, MARKER: 1},
    {"messages": MARKER},
    {"messages": MESSAGES, "model": MARKER},
    {"messages": MESSAGES, "temperature": MARKER},
    {"messages": [{"role": MARKER, "content": MARKER}]},
    {"messages": [{"role": "user", "content": [{"type": MARKER, "text": MARKER}]}]},
    {"messages": [*MESSAGES, {"role": "user", "content": MARKER * 100}]},
    {"messages": MESSAGES, "logit_bias": {MARKER: 1}},
    f'{{"messages": "{MARKER}'.encode(),
    MARKER.encode() + b"\xff",
]


async def say_to(running: Application, body: Any, **headers: str) -> Answered:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await running.request("POST", CHAT, data, content_type="application/json", headers={**HEADERS, **headers})


async def bad_requests(running: Application) -> None:
    for body in BAD_BODIES:
        assert 400 <= (await say_to(running, body)).status < 500
    assert (await say_to(running, {"messages": MESSAGES}, authorization=f"Bearer {MARKER}")).status == 401
    assert (await say_to(running, {"messages": MESSAGES}, **{"x-request-timeout": MARKER})).status == 400
    assert (await say_to(running, {"messages": MARKER * 10_000})).status == 413


async def good_requests(running: Application) -> None:
    for stream in (False, True):
        answered = await say_to(running, {"messages": MESSAGES, "stream": stream, "logprobs": True})
        assert answered.status == 200
        assert b"7" in answered.body


def failing(*_: object, **__: object) -> Any:
    try:
        raise KeyError(MARKER)
    except KeyError as error:
        raise ExceptionGroup(MARKER, [ValueError(MARKER), TypeError({"prompt": MARKER})]) from error


async def failing_later(_: object) -> None:
    failing()


async def unforeseen_errors(running: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a route, in a stream that has begun, and in what stands around the routes."""
    with monkeypatch.context() as patched:
        patched.setattr(chat, "encode_conversation", failing)
        assert (await say_to(running, {"messages": MESSAGES})).status == 500
    with monkeypatch.context() as patched:
        patched.setattr(chat._ChatView, "chunk", failing)
        assert b"internal_error" in (await say_to(running, {"messages": MESSAGES, "stream": True})).body
    with monkeypatch.context() as patched:
        patched.setitem(running.app.after_request_funcs, None, [failing_later])
        assert (await say_to(running, {"messages": MESSAGES})).status == 500


def assert_private(log: Logged) -> None:
    assert MARKER not in "\n".join(log.text)
    assert MARKER not in json.dumps(log.lines)


def test_no_log_has_what_clients_sent(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        log_config = LogConfig(access_log=True, level="debug")
        async with application(tiny_model_dir, http=HTTP, log=log_config, script=say(MARKER)) as running:
            with logged() as log:
                await good_requests(running)
                await bad_requests(running)
                await unforeseen_errors(running, monkeypatch)
            assert_private(log)
            # it was there to be told: everybody has a line, and what failed has its trace
            assert len(log.with_message("answered")) == 2 + len(BAD_BODIES) + 3 + 3
            traces = [line["exception"] for line in log.lines if "exception" in line]
            assert sum("in failing" in trace and "ExceptionGroup of 2" in trace for trace in traces) >= 3

    run(main)


def test_nor_when_the_engine_fails(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(
            tiny_model_dir,
            http=HTTP,
            log=LogConfig(access_log=True),
            script=say(MARKER),
            die_after=[2, 1],
            error_after=5,
        ) as running:
            with logged() as log:
                for stream in (False, True):
                    answered = await say_to(running, {"messages": MESSAGES, "stream": stream})
                    assert b"error" in answered.body
            assert_private(log)
            assert all(line["finish_reasons"] == ["error"] for line in log.with_message("answered"))

    run(main)


def test_nor_when_the_bytes_are_not_http(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with (
            application(tiny_model_dir, log=LogConfig(access_log=True)) as running,
            live_server(running.app) as server,
        ):
            with logged() as log:
                for bad in (
                    f"{MARKER}\r\n\r\n",
                    f"GET / HTTP/1.1\r\nHost: a\r\n{MARKER} : {MARKER}\r\n\r\n",
                    f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {MARKER}\r\n\r\n{MARKER}",
                    f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{MARKER}\r\n",
                ):
                    assert b" 400 " in await server.say(bad.encode())
                await server.say(http_request(CHAT, {"messages": MESSAGES}, headers="Connection: close\r\n"))
            assert_private(log)

    run(main, uses_threads=True)


def test_what_is_asked_for_is_logged(tiny_model_dir: Path) -> None:
    """The other way round: the marker can be found where it may be."""

    async def main() -> None:
        log_config = LogConfig(requests=True)
        async with application(tiny_model_dir, http=HTTP, log=log_config) as running:
            with logged() as log:
                await say_to(running, {"messages": MESSAGES, "user": "u"})
            (line,) = log.with_message("request")
            assert line["prompt"] == f"user: {MARKER}\n"
            assert f"sk-{MARKER}" not in "\n".join(log.text)

    run(main)
