"""Connections that end, stall or overlap. Many of these tests name the defect of a library that made them necessary."""

import json
import random
from typing import Any

import pytest
import trio
import trio.testing
from quart import Response
from trio.testing import trio_test

from llmd.config import HttpConfig
from llmd.server.connection import OpenRequests
from llmd.server.responses import DONE, Send, StreamResponse
from tests.server.conftest import Serving
from tests.server.live import (
    CLOSE,
    SOON,
    http_request,
    live_server,
    parse_answer,
    read_all,
    read_until,
    reset,
    until,
)
from tests.server.small_app import EVENT, SmallApp, assert_answers, num_tasks


def asgi_scope(path: str, **state: Any) -> Any:
    """A GET without headers, as Hypercorn hands it over."""
    scope: dict[str, Any] = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": path}
    scope |= {"raw_path": path.encode(), "query_string": b"", "headers": [], "root_path": "", "client": None}
    return scope | {"state": state}


@pytest.mark.parametrize("path", ["/quick", "/stream?count=3", "/missing"])
@pytest.mark.parametrize(("headers", "version"), [(CLOSE, "1.1"), ("", "1.0")])
@trio_test
async def test_server_closes_when_the_client_asked(serving: Serving, path: str, headers: str, version: str) -> None:
    """Quart-Trio cancelled the code that closes the connection, from inside the last `send`: no EOF, for ever."""
    async with serving(SmallApp().app) as server:
        answer = await server.say(http_request(path, headers=headers, version=version))
        assert answer.startswith(b"HTTP/1.1 404" if path == "/missing" else b"HTTP/1.1 200")


@trio_test
async def test_disconnect_from_inside_the_last_send_does_not_cancel_it() -> None:
    """The cause of the above, alone: Hypercorn closes or recycles the connection inside the `send` of the last byte,
    and reports `http.disconnect` before that."""
    send_disconnect, receive = trio.open_memory_channel[Any](1)
    closed = False

    async def send(message: Any) -> None:
        nonlocal closed
        if message["type"] == "http.response.body" and not message["more_body"]:
            await send_disconnect.send({"type": "http.disconnect"})
            await trio.testing.wait_all_tasks_blocked()
            closed = True

    with trio.fail_after(SOON):
        await SmallApp().app(asgi_scope("/quick"), receive.receive, send)
    assert closed


@trio_test
async def test_a_stream_that_is_cut_while_its_end_is_sent_has_one_end() -> None:
    """Over HTTP/2 what a slow client has not taken yet is sent after the cut all the same."""
    open_requests = OpenRequests()
    sent = b""

    async def send(message: Any) -> None:
        nonlocal sent
        sent += message.get("body", b"")
        if message.get("body", b"").endswith(DONE):
            open_requests.cut_all()
            await trio.lowlevel.checkpoint()

    async def receive() -> Any:
        await trio.sleep_forever()

    small = SmallApp()

    async def finished() -> Response:
        async def run(send: Send) -> None:
            await send(EVENT + DONE)

        return StreamResponse(run)

    small.app.add_url_rule("/finished", view_func=finished)
    with trio.fail_after(SOON):
        await small.app(asgi_scope("/finished", open_requests=open_requests), receive, send)
    assert sent == EVENT + DONE


@pytest.mark.parametrize(
    "first", [b"", b"GET /x HTTP/1.1\r\nHo", http_request("/quick"), http_request("/stream?count=2")]
)
@trio_test
async def test_idle_connection_is_closed(serving: Serving, first: bytes) -> None:
    """The same cancellation left the keep-alive timer unarmed: connections stayed open after their first request."""
    async with serving(SmallApp().app, HttpConfig(keep_alive_timeout=0.1)) as server:
        await server.say(first)


@trio_test
async def test_keep_alive_serves_many_requests(serving: Serving) -> None:
    async with serving(SmallApp().app) as server, await server.connect() as stream:
        for _ in range(20):
            await stream.send_all(http_request("/echo", {"a": 1}))
            assert await read_until(stream, b'{"a": 1}')
            await stream.send_all(http_request("/stream"))
            assert EVENT in await read_until(stream, b"0\r\n\r\n")


@trio_test
async def test_pipelined_requests_are_answered_in_order(serving: Serving) -> None:
    async with serving(SmallApp().app) as server:
        bodies = [{"i": i} for i in range(10)]
        sent = b"".join(http_request("/echo", body) for body in bodies) + http_request("/quick", headers=CLOSE)
        answer = await server.say(sent)
        places = [answer.index(json.dumps(body).encode()) for body in bodies]
        assert places == sorted(places)
        assert answer.endswith(b'{"ok":true}')


@trio_test
async def test_stream_outlives_the_response_timeout(serving: Serving) -> None:
    """Quart cuts a response after RESPONSE_TIMEOUT (60 s, here 0.05 s), without an error or a last chunk."""
    async with serving(SmallApp().app) as server:
        answer = await server.say(http_request("/stream?count=3&pause=0.1", headers=CLOSE))
        assert answer.count(EVENT) == 3
        assert answer.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("leave", ["fin", "rst"])
@pytest.mark.parametrize("pipelined", [b"", http_request("/quick")])
@pytest.mark.parametrize("path", ["/wait", "/hang"])
@trio_test
async def test_client_that_leaves_is_not_worked_for(serving: Serving, path: str, pipelined: bytes, leave: str) -> None:
    """With a second request pipelined the reader waited for its turn and saw neither FIN nor RST: tasks leaked."""
    small = SmallApp()
    async with serving(small.app) as server:
        tasks = num_tasks()
        stream = await server.connect()
        await stream.send_all(http_request(path) + pipelined)
        await until(small.is_working)
        if leave == "rst":
            reset(stream)
        else:
            await stream.aclose()
        await until(lambda: not small.is_working())
        assert small.cancelled == 1
        await until(lambda: num_tasks() == tasks)


@trio_test
async def test_pipelined_requests_in_pieces(serving: Serving) -> None:
    """However the bytes of many requests arrive, each is answered once and in order."""
    chance = random.Random(2)
    bodies = [{"i": i, "filling": "y" * chance.randrange(300)} for i in range(100)]
    sent = b"".join(http_request("/echo", body) for body in bodies) + http_request("/quick", headers=CLOSE)
    async with serving(SmallApp().app) as server, await server.connect() as stream, trio.open_nursery() as nursery:

        async def send_in_pieces() -> None:
            start = 0
            while start < len(sent):
                end = start + chance.randrange(1, 400)
                await stream.send_all(sent[start:end])
                start = end

        nursery.start_soon(send_in_pieces)
        answer = await read_all(stream)
    places = [answer.index(json.dumps(body).encode()) for body in bodies]
    assert places == sorted(places)
    assert answer.count(b"HTTP/1.1 200") == len(bodies) + 1


@trio_test
async def test_client_that_leaves_between_two_pipelined_requests(serving: Serving) -> None:
    """A request that was parsed just after its client had left would run for nobody, and never hear of it."""
    small = SmallApp()
    async with serving(small.app) as server:
        tasks = num_tasks()
        for num_steps in range(100):
            async with await server.connect() as stream:
                await stream.send_all(http_request("/quick") + http_request("/wait"))
                for _ in range(num_steps % 20):
                    await trio.lowlevel.checkpoint()
        await until(lambda: num_tasks() == tasks)
        assert not small.is_working()


@trio_test
async def test_client_that_pipelines_without_end_is_held_back(serving: Serving) -> None:
    """What it sends ahead is not kept without bound; and when it leaves, nothing stays."""
    small = SmallApp()
    taken_in = False

    async def send_ahead() -> None:
        nonlocal taken_in
        # more than all buffers of the kernel
        await stream.send_all(http_request("/quick") * 500_000)
        taken_in = True

    async with serving(small.app) as server, trio.open_nursery() as nursery:
        stream = await server.connect()
        await stream.send_all(http_request("/flood"))
        await until(small.is_working)
        nursery.start_soon(send_ahead)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert not taken_in
        nursery.cancel_scope.cancel()
        reset(stream)
        with trio.CancelScope(shield=True):
            await until(lambda: not small.is_working())


@trio_test
async def test_client_that_does_not_read_is_cut(serving: Serving) -> None:
    """Hypercorn's send is shielded and has no time limit: such a client could not be got rid of."""
    small = SmallApp()
    async with serving(small.app, HttpConfig(write_timeout=0.1)) as server:
        stream = await server.connect(receive_buffer=2048)
        await stream.send_all(http_request("/flood"))
        await until(lambda: small.cancelled)
        await assert_answers(server)
        await stream.aclose()


@trio_test
async def test_client_that_does_not_read_does_not_hold_up_the_shutdown(serving: Serving) -> None:
    """…and the shutdown waited until that client left."""
    small = SmallApp()
    async with serving(small.app, HttpConfig(write_timeout=1000, drain_timeout=0.1)) as server:
        stream = await server.connect(receive_buffer=2048)
        await stream.send_all(http_request("/flood"))
        await until(small.is_working)
        server.stop.set()
        with trio.fail_after(SOON):
            while not small.cancelled:
                await trio.sleep(0)
        # half a chunk was left in the air, so what it gets now must end there, and not go on with other words
        assert b"shutting down" not in await read_all(stream)
        with trio.fail_after(SOON):
            await server.stopped.wait()


@trio_test
async def test_slow_reader_gets_everything(serving: Serving) -> None:
    """The write timeout is for a client that takes nothing, not for one that takes long."""
    small = SmallApp()
    async with serving(small.app, HttpConfig(write_timeout=0.3)) as server:
        stream = await server.connect(receive_buffer=2048)
        await stream.send_all(http_request("/echo", "y" * 300_000, headers=CLOSE))
        received = bytearray()
        with trio.fail_after(60):
            while chunk := await stream.receive_some(20_000):
                received += chunk
                await trio.sleep(0.01)
        assert received.endswith(b'y"')
        assert received.count(b"y") >= 300_000


@trio_test
async def test_who_comes_during_the_shutdown_is_answered_once(serving: Serving) -> None:
    """Idle connections were closed under the next request of their clients, and a probe had no answer to look at."""
    small = SmallApp()
    async with serving(small.app) as server:
        fresh, idle, busy = await server.connect(), await server.connect(), await server.connect()
        await idle.send_all(http_request("/quick"))
        await read_until(idle, b'{"ok":true}')
        await busy.send_all(http_request("/hang"))
        await until(small.is_working)
        server.stop.set()
        await trio.testing.wait_all_tasks_blocked()
        for stream in (fresh, idle, await server.connect()):
            await stream.send_all(http_request("/quick"))
            answer = parse_answer(await read_all(stream))
            assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert small.is_working()


@trio_test
async def test_idle_connections_do_not_hold_up_the_shutdown(serving: Serving) -> None:
    async with serving(SmallApp().app) as server:
        fresh, idle = await server.connect(), await server.connect()
        await idle.send_all(http_request("/quick"))
        await read_until(idle, b'{"ok":true}')
        server.stop.set()
        assert await read_all(fresh) == b""
        assert await read_all(idle) == b""
        with trio.fail_after(SOON):
            await server.stopped.wait()


@trio_test
async def test_shutdown_finishes_what_runs(serving: Serving) -> None:
    async with serving(SmallApp().app) as server, await server.connect() as busy:
        await busy.send_all(http_request("/stream?count=5&pause=0.05"))
        await read_until(busy, EVENT)
        server.stop.set()
        rest = await read_all(busy)
        assert rest.count(EVENT) == 4
        assert rest.endswith(b"0\r\n\r\n")
        with trio.fail_after(SOON):
            await server.stopped.wait()


@trio_test
async def test_shutdown_ends_what_takes_too_long_with_an_error(serving: Serving) -> None:
    """Every accepted request ends once: with its answer or with an error object, never with silence."""
    small = SmallApp()
    async with serving(small.app, HttpConfig(drain_timeout=0.1)) as server:
        streaming, waiting = await server.connect(), await server.connect()
        await streaming.send_all(http_request("/hang"))
        await waiting.send_all(http_request("/wait"))
        await until(lambda: small.begun == 2)
        server.stop.set()
        streamed = await read_all(streaming)
        assert b'data: {"error":{"message":"The server is shutting down' in streamed
        assert b"data: [DONE]\n\n" in streamed
        assert streamed.endswith(b"0\r\n\r\n")
        answer = parse_answer(await read_all(waiting))
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        with trio.fail_after(SOON):
            await server.stopped.wait()


@trio_test
async def test_stream_that_fails_ends_with_an_error_event(serving: Serving) -> None:
    async with serving(SmallApp().app) as server:
        answer = await server.say(http_request("/fail", headers=CLOSE))
        assert answer.count(EVENT) == 1
        assert b'data: {"error":{"message":"Internal error' in answer
        assert b"secret" not in answer
        assert answer.endswith(b"0\r\n\r\n")


@trio_test
async def test_crowd_of_idle_and_half_sent_requests() -> None:
    """1000 idle connections and 100 that never finish their request: the next client notices nothing."""
    async with live_server(SmallApp().app) as server:
        streams = [await server.connect() for _ in range(1100)]
        for stream in streams[:100]:
            await stream.send_all(http_request("/echo", {"a": 1})[:-3])
        for stream in streams[100:]:
            await stream.send_all(http_request("/quick"))
        for stream in streams[100:]:
            await read_until(stream, b'{"ok":true}')
        await assert_answers(server)
        for stream in streams:
            stream.socket.close()
