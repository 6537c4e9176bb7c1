"""What is not the HTTP that this server speaks: refused politely, and nobody else notices."""

import random
import socket

import pytest
import trio
import trio.testing
from trio.testing import trio_test

from llmd.server.http1 import Http1Protocol
from tests.server.conftest import Serving
from tests.server.live import (
    CLOSE,
    SOON,
    http_request,
    parse_answer,
    read_all,
    read_until,
    until,
)
from tests.server.small_app import SmallApp, assert_answers, num_tasks

H2C = "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQC\r\n"


WEBSOCKET = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@pytest.mark.parametrize("upgrade", [H2C, WEBSOCKET])
@trio_test
async def test_upgrade_is_ignored(serving: Serving, upgrade: str) -> None:
    """An h2c upgrade with malformed settings raised through the connection into the listener: the server was gone."""
    async with serving(SmallApp().app) as server, await server.connect() as stream:
        await stream.send_all(http_request("/quick", headers=upgrade))
        assert parse_answer(await read_until(stream, b'{"ok":true}')).status == 200
        # and it goes on in the same protocol
        await stream.send_all(http_request("/quick", headers=CLOSE))
        assert parse_answer(await read_all(stream)).status == 200


@trio_test
async def test_http2_by_prior_knowledge_is_refused(serving: Serving) -> None:
    async with serving(SmallApp().app) as server:
        answer = parse_answer(await server.say(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)))
        assert answer.status == 505
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        await assert_answers(server)


SMUGGLED = "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /quick HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 2\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (http_request("/echo", method="POST", headers=SMUGGLED) + b"0\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
         b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /quick HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000, 431),
    ],
)  # fmt: skip
@trio_test
async def test_bad_http_gets_an_error_object(serving: Serving, request_bytes: bytes, status: int) -> None:
    """Hypercorn answers these with an empty body, which the `openai` package cannot show."""
    small = SmallApp()
    async with serving(small.app) as server:
        answer = parse_answer(await server.say(request_bytes))
        assert answer.status == status
        assert answer.headers["x-request-id"].startswith("req_")
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        await assert_answers(server)


@pytest.mark.parametrize("framing", ["length", "chunked"])
@trio_test
async def test_too_large_upload_is_told_so(serving: Serving, framing: str) -> None:
    """Closing on a client that still uploads makes its kernel throw the answer away; so the upload is read on.

    Quart 0.23 looks at the size of a chunked body only at its end, which here never comes.
    """
    size = 3_000_000
    body = b"z" * size if framing == "length" else b"%x\r\n%b\r\n" % (size, b"z" * size)
    header = f"Content-Length: {size}\r\n" if framing == "length" else "Transfer-Encoding: chunked\r\n"
    header += "Content-Type: application/json\r\n"
    async with serving(SmallApp(max_body_bytes=1000).app) as server:
        answer = parse_answer(await server.say(http_request("/echo", method="POST", headers=header) + body))
        assert answer.status == 413
        assert "1000 bytes" in answer.json()["error"]["message"]


@trio_test
async def test_body_that_does_not_come_in_time_gets_408(serving: Serving) -> None:
    async with serving(SmallApp(body_timeout=0.05).app) as server:
        answer = parse_answer(await server.say(http_request("/echo", {"a": 1}, headers=CLOSE)[:-2]))
        assert answer.status == 408
        assert answer.json()["error"]["code"] == "request_timeout"


@trio_test
async def test_who_closes_for_sending_gets_a_whole_answer_or_none(serving: Serving) -> None:
    """The request's task was cancelled before it had written a byte, and noticed that between head and body."""
    request_bytes = http_request("/echo", {"a": 1})

    def ask(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port)) as plain, client(plain) as connection:
            connection.sendall(request_bytes)
            # an SSLSocket's own would also forget the encryption
            socket.socket.shutdown(connection, socket.SHUT_WR)
            connection.settimeout(SOON)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))

    async with serving(SmallApp().app) as server:

        def client(plain: socket.socket) -> socket.socket:
            context = server.client_context
            return plain if context is None else context.wrap_socket(plain, server_hostname="localhost")

        for _ in range(60):
            answer = await trio.to_thread.run_sync(ask, server.port)
            assert answer == b"" or parse_answer(answer).body == b'{"a": 1}', answer


@trio_test
async def test_expect_100_continue(serving: Serving) -> None:
    """curl asks before it sends a large body."""
    async with serving(SmallApp().app) as server, await server.connect() as stream:
        head, _, body = http_request("/echo", {"a": 1}, headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
        await stream.send_all(head + b"\r\n\r\n")
        assert (await read_until(stream, b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        await stream.send_all(body)
        assert await read_until(stream, body)


SEEDS = (
    http_request("/quick"),
    http_request("/echo", {"a": 1}),
    http_request("/quick", headers=H2C),
    http_request("/quick", headers=WEBSOCKET),
    http_request("/stream?count=3"),
    http_request("/echo", method="POST", headers="Transfer-Encoding: chunked\r\n") + b"3\r\nabc\r\n0\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
)


def mutate(chance: random.Random, data: bytearray) -> None:
    place = chance.randrange(len(data))
    match chance.choice(["replace", "delete", "insert", "repeat"]):
        case "replace":
            data[place] = chance.randrange(256)
        case "delete":
            del data[place : place + chance.randrange(1, 20)]
        case "insert":
            data[place:place] = chance.randbytes(chance.randrange(1, 20))
        case "repeat":
            data += data[place:]


@trio_test
async def test_a_connection_that_fails_takes_nobody_with_it(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypercorn runs every connection in the listener's nursery: what one raises ends them all."""

    async def fail(*arguments: object) -> None:
        raise ExceptionGroup("two at once", [ValueError("bug"), KeyError("bug")])

    small = SmallApp()
    async with serving(small.app) as server, await server.connect() as neighbour:
        await neighbour.send_all(http_request("/hang"))
        await until(small.is_working)
        with monkeypatch.context() as patched:
            patched.setattr(Http1Protocol, "_handle_next_event", fail)
            assert await server.say(http_request("/quick")) == b""
        await assert_answers(server)
        assert small.is_working()


@trio_test
async def test_garbage_leaves_nothing_behind(serving: Serving) -> None:
    """Fuzzing is what found the h2c crash. Fixed seed, so a failure can be repeated."""
    chance = random.Random(1)
    small = SmallApp()
    async with serving(small.app) as server:
        tasks = num_tasks()
        for _ in range(300):
            data = bytearray(chance.choice(SEEDS))
            for _ in range(chance.choice([0, 1, 1, 2, 5])):
                if data:
                    mutate(chance, data)
            stream = await server.connect()
            try:
                await stream.send_all(data)
                with trio.move_on_after(0.01):
                    await stream.receive_some()
            except trio.BrokenResourceError:
                pass
            await stream.aclose()
        await until(lambda: num_tasks() == tasks)
        assert not small.is_working()
        await assert_answers(server)
