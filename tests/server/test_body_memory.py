"""Bodies that come in, all together: they cannot fill the memory, and the small ones find room beside the large."""

import os

import hypothesis.strategies as st
import pytest
import trio
from hypothesis import given
from trio.testing import trio_test

from llmd.config import HttpConfig
from llmd.errors import Overloaded
from llmd.server.body_memory import BodyMemory, HeldBody
from tests.server.conftest import Serving
from tests.server.h2_client import h2_client
from tests.server.live import Stream, http_request, live_server, parse_answer, read_until, until
from tests.server.small_app import SmallApp

MAX_BODY = 1 << 16
JSON = [("content-type", "application/json")]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 300)), max_size=60))
def test_a_body_may_have_as_much_as_all_leave_free(steps: list[tuple[int, int]]) -> None:
    memory = BodyMemory(1000)
    bodies = [HeldBody(memory) for _ in range(10)]
    held = [0] * 10
    for index, num_bytes in steps:
        if num_bytes == 0:
            bodies[index].release()
            held[index] = 0
        elif bodies[index].hold(num_bytes):
            held[index] += num_bytes
            assert held[index] <= 1000 - sum(held)
        else:
            with pytest.raises(Overloaded):
                bodies[index].check()
        assert memory.num_bytes == sum(held) < 1000
    for body in bodies:
        body.release()
    assert memory.num_bytes == 0


def test_however_large_bodies_may_be_one_has_room() -> None:
    assert BodyMemory.for_bodies_of(1000).max_bytes == 8000
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert BodyMemory.for_bodies_of(machine // 10).max_bytes == machine // 4
    assert HeldBody(BodyMemory.for_bodies_of(machine)).hold(machine)


async def begin_upload(stream: Stream, size: int) -> None:
    """All but the last byte."""
    headers = f"Content-Type: application/json\r\nContent-Length: {size}\r\n"
    await stream.send_all(http_request("/echo", method="POST", headers=headers) + b"x" * (size - 1))


@trio_test
async def test_more_uploads_than_there_is_room_for(serving: Serving) -> None:
    """100 bodies of 16 MB that never ended took 1.6 GB."""
    config = HttpConfig(max_body_bytes=MAX_BODY)
    async with serving(SmallApp(max_body_bytes=MAX_BODY).app, config) as server:
        for leaves in (True, False):
            streams = [await server.connect() for _ in range(20)]
            sent: list[Stream] = []
            refused: list[Stream] = []

            async def upload(stream: Stream, sent: list[Stream] = sent, refused: list[Stream] = refused) -> None:
                await begin_upload(stream, MAX_BODY)
                sent.append(stream)
                answer = parse_answer(await read_until(stream, b"}}"))
                assert (answer.status, answer.headers["retry-after"]) == (429, "5")
                assert answer.json()["error"]["code"] == "rate_limit_exceeded"
                refused.append(stream)

            async with trio.open_nursery() as nursery:
                for stream in streams:
                    nursery.start_soon(upload, stream)
                # of eight there would be no room for the last: it may have only as much as they leave free
                await until(lambda sent=sent, refused=refused: len(sent) == 20 and len(refused) >= 13)
                nursery.cancel_scope.cancel()
            # a small one has room beside those that are left
            async with await server.connect() as stream:
                await stream.send_all(http_request("/echo", {"a": 1}))
                assert await read_until(stream, b'{"a": 1}')
            for stream in streams:
                if not leaves and stream not in refused:
                    await stream.send_all(b"x")
                    assert (await read_until(stream, b"x" * MAX_BODY)).startswith(b"HTTP/1.1 200")
                await trio.aclose_forcefully(stream)
        # what they took has come back
        streams = [await server.connect() for _ in range(7)]
        for stream in streams:
            await begin_upload(stream, MAX_BODY)
        for stream in streams:
            await stream.send_all(b"x")
            assert (await read_until(stream, b"x" * MAX_BODY)).startswith(b"HTTP/1.1 200")
            await trio.aclose_forcefully(stream)


@trio_test
async def test_more_uploads_on_one_connection_than_there_is_room_for() -> None:
    config = HttpConfig(max_body_bytes=MAX_BODY)
    app = SmallApp(max_body_bytes=MAX_BODY).app
    async with live_server(app, config, tls=True) as server, h2_client(server) as client:
        for _ in range(2):
            stream_ids = [await client.begin("/echo", method="POST", headers=JSON, end=False) for _ in range(12)]
            for stream_id in stream_ids:
                await client.upload(stream_id, b"x" * (MAX_BODY - 1), end=False)
            # of twelve there is room for seven
            await client.until(lambda ids=stream_ids: sum(client.answers[each].is_complete for each in ids) >= 5)
            refused = [each for each in stream_ids if client.answers[each].is_complete]
            for each in refused:
                answer = client.answers[each]
                assert (answer.status, answer.headers["retry-after"]) == (429, "5")
            assert (await client.ask("/echo", {"a": 1})).json() == {"a": 1}
            for each in set(stream_ids) - set(refused):
                client.h2.send_data(each, b"", end_stream=True)
                await client.flush()
                assert (await client.answer(each)).status == 200
