"""HTTP/2 over TLS: the same traps as `test_connections` and `test_bad_http`, and those that are its own."""

import json
import random
from collections.abc import Callable
from typing import Any

import h2.events
import httpx2
import pytest
import trio
import trio.testing
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    ExtensionFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from trio.testing import trio_test

from llmd.config import HttpConfig
from llmd.server import http2
from llmd.server.http2 import Http2Protocol
from llmd.server.http2_limits import MAX_STREAMS
from tests.server.certificates import shared_certificates
from tests.server.conftest import Serving
from tests.server.h2_client import H2Client, h2_client
from tests.server.live import SOON, http_request, live_server, parse_answer, read_until, reset, until
from tests.server.small_app import EVENT, SmallApp, num_tasks


@pytest.fixture
def serving_h2() -> Serving:
    def serve(*arguments: Any, **options: Any) -> Any:
        return live_server(*arguments, tls=True, **options)

    return serve


@pytest.mark.parametrize(
    ("offered", "chosen"), [(("h2", "http/1.1"), "h2"), (("http/1.1",), "http/1.1"), (("spdy/1",), None), ((), None)]
)
@trio_test
async def test_the_client_chooses_among_two_protocols(
    serving_h2: Serving, offered: tuple[str, ...], chosen: str | None
) -> None:
    async with serving_h2(SmallApp().app) as server:
        assert server.client_context is not None
        if offered:
            server.client_context.set_alpn_protocols(list(offered))
        async with await server.connect() as stream:
            assert isinstance(stream, trio.SSLStream)
            assert stream.selected_alpn_protocol() == chosen
            if chosen != "h2":
                await stream.send_all(http_request("/quick"))
                assert parse_answer(await read_until(stream, b'{"ok":true}')).status == 200


@trio_test
async def test_answers_and_errors(serving_h2: Serving) -> None:
    async with serving_h2(SmallApp(max_body_bytes=1000).app) as server, h2_client(server) as client:
        answer = await client.ask("/quick")
        assert (answer.status, answer.json()) == (200, {"ok": True})
        assert (await client.ask("/echo", {"a": 1})).json() == {"a": 1}
        assert (await client.ask("/stream?count=3")).body == EVENT * 3
        assert (await client.ask("/quick", method="HEAD")).body == b""
        for path, options, status in (
            ("/missing", {}, 404),
            ("/quick", {"method": "POST"}, 405),
            ("/echo", {"body": "y" * 2000}, 413),
            ("/echo", {"method": "POST", "headers": [("content-type", "text/plain")]}, 415),
            ("quick", {}, 400),
            ("/qu\u00efck", {}, 400),
            ("/quick", {"method": "GE T"}, 400),
            ("/quick", {"headers": [("content-length", "5")]}, 400),  # and then no body
        ):
            answer = await client.ask(path, **options)
            assert answer.is_complete
            assert answer.status == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert client.goaway is None


@trio_test
async def test_connect_is_refused(serving_h2: Serving) -> None:
    async with serving_h2(SmallApp().app) as server, h2_client(server) as client:
        stream_id = await client.begin_with([(":method", "CONNECT"), (":authority", "example.com:443")])
        answer = await client.answer(stream_id)
        assert (answer.status, answer.json()["error"]["code"]) == (501, "not_implemented")
        assert answer.headers["x-request-id"].startswith("req_")
        assert (await client.ask("/quick")).status == 200


@trio_test
async def test_many_requests_at_once(serving_h2: Serving) -> None:
    """Larger than all windows together, and each gets its own."""
    async with serving_h2(SmallApp().app) as server, h2_client(server) as client:
        bodies = [{"i": i, "filling": "y" * 5000} for i in range(8)]
        for _ in range(5):
            stream_ids = [await client.begin("/echo", body) for body in bodies]
            answers = [await client.answer(stream_id) for stream_id in stream_ids]
            assert [answer.json() for answer in answers] == bodies


@trio_test
async def test_a_short_answer_is_not_held_up_by_a_long_one(serving_h2: Serving) -> None:
    small = SmallApp()
    async with serving_h2(small.app) as server, h2_client(server) as client:
        endless = await client.begin("/flood")
        assert (await client.ask("/quick")).status == 200
        assert not client.answers[endless].is_over
        assert small.is_working()


@trio_test
async def test_an_upload_that_is_too_large_is_told_so(serving_h2: Serving) -> None:
    """The answer comes before the upload ends; the connection goes on."""
    async with serving_h2(SmallApp(max_body_bytes=1000).app) as server, h2_client(server) as client:
        stream_id = await client.begin(
            "/echo", method="POST", headers=[("content-type", "application/json")], end=False
        )
        await client.upload(stream_id, b"z" * 1_000_000)
        answer = await client.answer(stream_id)
        assert (answer.status, answer.reset) == (413, None)
        assert "1000 bytes" in answer.json()["error"]["message"]
        assert (await client.ask("/quick")).status == 200


@trio_test
async def test_an_upload_that_never_ends_is_reset(serving_h2: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the answer, then the reset that says that nobody listens any more (RFC 9113 section 8.1)."""
    monkeypatch.setattr(http2, "UPLOAD_GRACE", 0.05)
    headers = [("content-type", "application/json")]
    async with serving_h2(SmallApp(body_timeout=0.05).app) as server, h2_client(server) as client:
        stream_id = await client.begin("/echo", method="POST", headers=headers, end=False)
        answer = await client.answer(stream_id)
        assert (answer.status, answer.json()["error"]["code"]) == (408, "request_timeout")
        await client.until(lambda: answer.reset is not None)
        assert answer.reset == ErrorCodes.NO_ERROR


@trio_test
async def test_expect_100_continue(serving_h2: Serving) -> None:
    async with serving_h2(SmallApp().app) as server, h2_client(server) as client:
        headers = [("content-type", "application/json"), ("expect", "100-continue")]
        stream_id = await client.begin("/echo", method="POST", headers=headers, end=False)
        await client.until(
            lambda: any(isinstance(event, h2.events.InformationalResponseReceived) for event in client.events)
        )
        await client.upload(stream_id, b'{"a":1}')
        assert (await client.answer(stream_id)).json() == {"a": 1}


@trio_test
async def test_a_stream_that_fails_ends_with_an_error_event(serving_h2: Serving) -> None:
    async with serving_h2(SmallApp().app) as server, h2_client(server) as client:
        answer = await client.ask("/fail")
        assert answer.is_complete
        assert b'data: {"error":{"message":"Internal error' in answer.body
        assert b"secret" not in answer.body


@trio_test
async def test_an_answer_that_is_given_up_is_reset(serving_h2: Serving) -> None:
    """Its client would wait for ever, and the stream would count as open."""

    async def give_up(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        if scope["path"] == "/fail":
            raise ValueError("bug")
        await send({"type": "http.response.body", "body": b""})

    async with serving_h2(give_up) as server, h2_client(server) as client:
        assert (await client.ask("/fail")).reset == ErrorCodes.INTERNAL_ERROR
        answer = await client.ask("/")
        assert (answer.body, answer.reset) == (b"half", None)


@pytest.mark.parametrize("path", ["/wait", "/hang", "/flood"])
@trio_test
async def test_a_reset_stops_its_own_request_only(serving_h2: Serving, path: str) -> None:
    small = SmallApp()
    async with serving_h2(small.app) as server, h2_client(server) as client:
        stays, goes = await client.begin("/hang"), await client.begin(path)
        await until(lambda: small.begun == 2)
        client.h2.reset_stream(goes, ErrorCodes.CANCEL)
        await client.flush()
        await until(lambda: small.ended == 1)
        assert small.cancelled == 1
        assert (await client.ask("/quick")).status == 200
        assert not client.answers[stays].is_over


@pytest.mark.parametrize("leave", ["fin", "rst", "goaway"])
@trio_test
async def test_a_client_that_leaves_is_not_worked_for(serving_h2: Serving, leave: str) -> None:
    small = SmallApp()
    async with serving_h2(small.app) as server:
        tasks = num_tasks()
        async with h2_client(server) as client:
            for path in ("/wait", "/hang", "/flood", "/hang"):
                await client.begin(path)
            await until(lambda: small.begun == 4)
            if leave == "rst":
                reset(client.stream)
            elif leave == "goaway":
                client.h2.close_connection()
                await client.flush()
                await until(lambda: not small.is_working())
        await until(lambda: not small.is_working())
        assert small.cancelled == 4
        await until(lambda: num_tasks() == tasks)


@trio_test
async def test_a_stream_without_a_window_is_cut_and_the_others_go_on(serving_h2: Serving) -> None:
    small = SmallApp()
    no_window = {SettingCodes.INITIAL_WINDOW_SIZE: 0}
    async with (
        serving_h2(small.app, HttpConfig(write_timeout=0.2)) as server,
        h2_client(server, settings=no_window) as client,
    ):
        stuck = await client.begin("/flood")
        waiting = await client.begin("/quick")
        # one of the two may be answered
        client.h2.increment_flow_control_window(1000, waiting)
        await client.flush()
        assert (await client.answer(waiting)).json() == {"ok": True}
        assert (await client.answer(stuck)).reset == ErrorCodes.CANCEL
        await until(lambda: small.cancelled == 1)
        assert client.goaway is None
        # an end needs no window
        assert (await client.ask("/quick", method="HEAD")).status == 200


@trio_test
async def test_a_client_that_does_not_read_is_cut(serving_h2: Serving) -> None:
    """It opens every window, but takes no bytes from its socket."""
    small = SmallApp()
    async with serving_h2(small.app, HttpConfig(write_timeout=0.1)) as server:
        tasks = num_tasks()
        async with h2_client(server, receive_buffer=2048) as client:
            client.h2.increment_flow_control_window(1 << 30)
            for _ in range(3):
                client.h2.increment_flow_control_window(1 << 30, await client.begin("/flood"))
            await client.flush()
            await until(lambda: small.cancelled == 3)
            await until(lambda: num_tasks() == tasks)


@trio_test
async def test_a_client_that_does_not_read_does_not_hold_up_the_shutdown(serving_h2: Serving) -> None:
    small = SmallApp()
    async with (
        serving_h2(small.app, HttpConfig(write_timeout=1000, drain_timeout=0.1)) as server,
        h2_client(server, receive_buffer=2048) as client,
    ):
        stream_id = await client.begin("/flood")
        client.h2.increment_flow_control_window(1 << 30)
        client.h2.increment_flow_control_window(1 << 30, stream_id)
        await client.flush()
        await until(small.is_working)
        server.stop.set()
        with trio.fail_after(SOON):
            await server.stopped.wait()
        assert small.cancelled == 1


@trio_test
async def test_a_slow_reader_gets_everything(serving_h2: Serving) -> None:
    """The write timeout is for a client that takes nothing, not for one that takes long."""
    async with (
        serving_h2(SmallApp().app, HttpConfig(write_timeout=0.5)) as server,
        h2_client(server, settings={SettingCodes.INITIAL_WINDOW_SIZE: 5000}) as client,
    ):
        stream_id = await client.begin(
            "/echo", method="POST", headers=[("content-type", "application/json")], end=False
        )
        await client.upload(stream_id, json.dumps("y" * 100_000).encode())
        answer = client.answers[stream_id]
        with trio.fail_after(60):
            while not answer.is_over:
                await client.read()
                await trio.sleep(0.02)
        assert answer.json() == "y" * 100_000


@pytest.mark.parametrize("path", [None, "/quick", "/stream?count=2"])
@trio_test
async def test_an_idle_connection_is_closed(serving_h2: Serving, path: str | None) -> None:
    async with serving_h2(SmallApp().app, HttpConfig(keep_alive_timeout=0.5)) as server, h2_client(server) as client:
        if path is not None:
            assert (await client.ask(path)).status == 200
        await client.read_to_end()
        assert client.goaway is not None
        assert client.goaway.error_code == ErrorCodes.NO_ERROR


@trio_test
async def test_pings_do_not_keep_a_connection_open(serving_h2: Serving) -> None:
    async with serving_h2(SmallApp().app, HttpConfig(keep_alive_timeout=0.3)) as server, h2_client(server) as client:
        with trio.fail_after(SOON):
            while not client.is_closed:
                await client.send_frames([PingFrame(0, b"12345678")])
                await client.read()
                await trio.sleep(0.02)
        # for its idleness, and not for its pings
        assert client.goaway is not None
        assert client.goaway.error_code == ErrorCodes.NO_ERROR


@trio_test
async def test_a_request_that_runs_keeps_its_connection_open(serving_h2: Serving) -> None:
    async with serving_h2(SmallApp().app, HttpConfig(keep_alive_timeout=0.1)) as server, h2_client(server) as client:
        assert (await client.ask("/stream?count=3&pause=0.2")).body == EVENT * 3


@trio_test
async def test_shutdown_closes_idle_connections_at_once(serving_h2: Serving) -> None:
    small = SmallApp()
    async with serving_h2(small.app) as server, h2_client(server) as idle, h2_client(server) as busy:
        await busy.begin("/hang")
        await until(small.is_working)
        await trio.testing.wait_all_tasks_blocked(0.05)
        server.stop.set()
        await idle.read_to_end()
        assert idle.goaway is not None
        assert small.is_working()


@trio_test
async def test_shutdown_finishes_what_runs(serving_h2: Serving) -> None:
    """The GOAWAY comes last: httpx would give up the stream when it sees one."""
    async with serving_h2(SmallApp().app) as server, h2_client(server) as client:
        runs = await client.begin("/stream?count=5&pause=0.1")
        await client.until(lambda: client.answers[runs].body)
        server.stop.set()
        # whoever asks now is told what there is to tell
        assert (await client.ask("/missing")).status == 404
        assert (await client.answer(runs)).body == EVENT * 5
        await client.read_to_end()
        assert client.goaway is not None
        with trio.fail_after(SOON):
            await server.stopped.wait()


@trio_test
async def test_httpx_keeps_its_stream_in_a_shutdown(serving_h2: Serving) -> None:
    """The reason for the above, with the client that the `openai` package uses."""
    trust = shared_certificates().client_context()
    async with serving_h2(SmallApp().app) as server, httpx2.AsyncClient(verify=trust, http2=True) as client:
        url = f"https://localhost:{server.port}/stream?count=5&pause=0.1"
        async with client.stream("GET", url) as answer:
            received = b""
            async for data in answer.aiter_bytes():
                received += data
                server.stop.set()
        assert (answer.http_version, received) == ("HTTP/2", EVENT * 5)


@trio_test
async def test_shutdown_ends_what_takes_too_long_with_an_error(serving_h2: Serving) -> None:
    small = SmallApp()
    async with serving_h2(small.app, HttpConfig(drain_timeout=0.1)) as server, h2_client(server) as client:
        streams, waits = await client.begin("/hang"), await client.begin("/wait")
        await until(lambda: small.begun == 2)
        server.stop.set()
        await client.read_to_end()
        streamed, answer = client.answers[streams], client.answers[waits]
        assert b'data: {"error":{"message":"The server is shutting down' in streamed.body
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert streamed.is_complete
        assert answer.is_complete
        with trio.fail_after(SOON):
            await server.stopped.wait()


REQUEST = [(":method", "GET"), (":scheme", "https"), (":authority", "localhost"), (":path", "/quick")]


@pytest.mark.parametrize(
    "fields",
    [
        REQUEST[1:],  # no :method
        REQUEST[:3],  # no :path
        [*REQUEST[:3], (":path", "")],
        [*REQUEST, (":path", "/stream")],
        [*REQUEST, (":status", "200")],
        [*REQUEST, (":new", "x")],
        [("accept", "*/*"), *REQUEST],  # pseudo-headers come first
        [*REQUEST[:2], REQUEST[3]],  # nobody is asked
        [*REQUEST, ("host", "elsewhere")],
        [*REQUEST, ("Accept", "*/*")],
        [*REQUEST, ("connection", "keep-alive")],
        [*REQUEST, ("transfer-encoding", "chunked")],
        [*REQUEST, ("te", "gzip")],
        [*REQUEST, ("x", "a\r\nb: c")],
        [*REQUEST, ("x y", "z")],
        [*REQUEST, ("content-length", "many")],
        [*REQUEST, ("x", "y" * 100_000)],
        [*REQUEST, *[(f"x{i}", "") for i in range(2000)]],
    ],
    ids=lambda fields: str(fields)[-40:],
)
@trio_test
async def test_a_malformed_request_ends_its_connection_only(serving_h2: Serving, fields: list[tuple[str, str]]) -> None:
    small = SmallApp()
    async with serving_h2(small.app) as server, h2_client(server) as neighbour:
        await neighbour.begin("/hang")
        await until(small.is_working)
        async with h2_client(server, validates=False) as client:
            await client.begin_with(fields)
            await client.read_to_end()
            assert client.goaway is not None
            assert client.goaway.error_code != ErrorCodes.NO_ERROR
        assert small.begun == 1
        assert small.is_working()
        assert (await neighbour.ask("/quick")).status == 200


@trio_test
async def test_trailers(serving_h2: Serving) -> None:
    """They are read and forgotten, unless they say what trailers may not say."""
    async with serving_h2(SmallApp().app) as server, h2_client(server, validates=False) as client:
        headers = [("content-type", "application/json")]
        stream_id = await client.begin("/echo", {"a": 1}, end=False)
        client.h2.send_headers(stream_id, [("x-sum", "1")], end_stream=True)
        await client.flush()
        assert (await client.answer(stream_id)).json() == {"a": 1}
        stream_id = await client.begin("/echo", method="POST", headers=headers, end=False)
        client.h2.send_headers(stream_id, [(":path", "/quick")], end_stream=True)
        await client.flush()
        await client.read_to_end()
        assert client.goaway is not None
        assert client.goaway.error_code == ErrorCodes.PROTOCOL_ERROR


def request_frames(client: H2Client, *, end: bool = True, path: str = "/wait") -> Frame:
    """The next request, not counted by the client's own h2."""
    stream_id = client.h2.get_next_available_stream_id()
    client.h2.streams.clear()
    client.h2.highest_outbound_stream_id = stream_id
    fields = [(name, path if name == ":path" else value) for name, value in REQUEST]
    frame = HeadersFrame(stream_id, client.h2.encoder.encode(fields))
    frame.flags.add("END_HEADERS")
    if end:
        frame.flags.add("END_STREAM")
    return frame


def ping_flood(client: H2Client) -> list[Frame]:
    return [PingFrame(0, b"12345678")] * 2000


def settings_flood(client: H2Client) -> list[Frame]:
    return [SettingsFrame(0, settings={SettingCodes.HEADER_TABLE_SIZE: size}) for size in range(2000)]


def empty_data_flood(client: H2Client) -> list[Frame]:
    request = request_frames(client, end=False)
    return [request, *[DataFrame(request.stream_id, b"")] * 2000]


def rapid_reset(client: H2Client) -> list[Frame]:
    """CVE-2023-44487."""
    requests = [request_frames(client) for _ in range(2000)]
    return [frame for request in requests for frame in (request, RstStreamFrame(request.stream_id, error_code=8))]


def continuation_flood(client: H2Client) -> list[Frame]:
    request = request_frames(client)
    request.flags.discard("END_HEADERS")
    return [request, *[ContinuationFrame(request.stream_id, b"\x00\x01x\x01y" * 100)] * 2000]


def unknown_flood(client: H2Client) -> list[Frame]:
    return [ExtensionFrame(0xBA, 0, body=b"x")] * 2000


def too_many_streams(client: H2Client) -> list[Frame]:
    return [request_frames(client) for _ in range(MAX_STREAMS + 1)]


def reset_by_window_overflow(client: H2Client) -> list[Frame]:
    """Requests that make the server itself reset them, which no limit on streams counts."""
    requests = [request_frames(client) for _ in range(2000)]
    return [frame for each in requests for frame in (each, WindowUpdateFrame(each.stream_id, (1 << 31) - 1))]


@pytest.mark.parametrize(
    "flood",
    [
        ping_flood,
        settings_flood,
        empty_data_flood,
        rapid_reset,
        continuation_flood,
        unknown_flood,
        too_many_streams,
        reset_by_window_overflow,
    ],
)
@trio_test
async def test_a_flood_ends_its_connection_only(serving_h2: Serving, flood: Callable[[H2Client], list[Frame]]) -> None:
    small = SmallApp()
    async with serving_h2(small.app) as server:
        tasks = num_tasks()
        async with h2_client(server) as client, trio.open_nursery() as nursery:
            assert (await client.ask("/quick")).status == 200
            # a client that only sends would be cut for that
            nursery.start_soon(client.send_frames, flood(client))
            await client.read_to_end()
            assert client.goaway is not None
            assert client.goaway.error_code != ErrorCodes.NO_ERROR
            nursery.cancel_scope.cancel()
        await until(lambda: num_tasks() == tasks)
        assert not small.is_working()
        await assert_answers_h2(server)


@trio_test
async def test_many_cancelled_requests_are_no_flood(serving_h2: Serving) -> None:
    """A proxy brings many clients on one connection, and all of them may leave at once."""
    small = SmallApp()
    async with serving_h2(small.app) as server, h2_client(server) as client:
        for _ in range(2):
            stream_ids = [await client.begin("/hang") for _ in range(MAX_STREAMS)]
            await until(lambda: small.begun - small.ended == MAX_STREAMS)
            for stream_id in stream_ids:
                client.h2.reset_stream(stream_id, ErrorCodes.CANCEL)
            await client.flush()
            await until(lambda: not small.is_working())
        assert (await client.ask("/quick")).status == 200


@trio_test
async def test_what_the_client_lets_the_server_remember_is_bounded(serving_h2: Serving) -> None:
    """A client may allow a table of headers of 4 GB; every answer would put its X-Request-Id in it."""
    table = {SettingCodes.HEADER_TABLE_SIZE: (1 << 32) - 1}
    async with serving_h2(SmallApp().app) as server, h2_client(server, settings=table) as client:
        assert (await client.ask("/quick")).status == 200
        assert client.h2.decoder.header_table_size <= 4096


@trio_test
async def test_a_connection_that_fails_takes_nobody_with_it(
    serving_h2: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*arguments: object) -> None:
        raise ExceptionGroup("two at once", [ValueError("bug"), KeyError("bug")])

    small = SmallApp()
    async with serving_h2(small.app) as server, h2_client(server) as neighbour:
        await neighbour.begin("/hang")
        await until(small.is_working)
        async with h2_client(server) as client:
            with monkeypatch.context() as patched:
                patched.setattr(Http2Protocol, "_handle_event", fail)
                await client.begin("/quick")
                await client.read_to_end()
        assert (await neighbour.ask("/quick")).status == 200
        assert small.is_working()


@trio_test
async def test_garbage_leaves_nothing_behind(serving_h2: Serving) -> None:
    """Fixed seed, so a failure can be repeated."""
    chance = random.Random(1)
    small = SmallApp()
    async with serving_h2(small.app) as server:
        tasks = num_tasks()
        for _ in range(150):
            async with h2_client(server) as client:
                frames = [
                    chance.choice(
                        [
                            request_frames(client, end=chance.random() < 0.5, path=chance.choice(["/hang", "/quick"])),
                            request_frames(client, path="/flood"),
                            DataFrame(chance.randrange(1, 5), b"{}", flags=chance.choice([(), ("END_STREAM",)])),
                            PingFrame(0, b"12345678"),
                            SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: chance.randrange(1 << 17)}),
                            WindowUpdateFrame(chance.randrange(5), chance.randrange(1, 1 << 31)),
                            RstStreamFrame(chance.randrange(1, 5)),
                        ]
                    )
                    for _ in range(chance.randrange(1, 6))
                ]
                data = bytearray(b"".join(frame.serialize() for frame in frames))
                for _ in range(chance.choice([0, 1, 1, 2, 5])):
                    data[chance.randrange(len(data))] = chance.randrange(256)
                with trio.move_on_after(0.02):
                    await client.stream.send_all(data)
                    await client.stream.receive_some()
        await until(lambda: num_tasks() == tasks)
        assert not small.is_working()
        await assert_answers_h2(server)


async def assert_answers_h2(server: Any) -> None:
    async with h2_client(server) as client:
        assert (await client.ask("/quick")).json() == {"ok": True}
