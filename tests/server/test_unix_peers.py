"""Clients on a unix socket, which have no address, are served as those on TCP."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from trio.testing import trio_test

from llmd.config import HttpConfig
from llmd.server.serving import serve
from tests.server.live import CLOSE, http_request, parse_answer, read_all, read_until, until
from tests.server.small_app import EVENT, SmallApp


@asynccontextmanager
async def served(small: SmallApp, path: Path) -> AsyncIterator[trio.Event]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: _serve(small, listener, stop, task_status))
        yield stop
        nursery.cancel_scope.cancel()


async def _serve(
    small: SmallApp, listener: socket.socket, stop: trio.Event, task_status: trio.TaskStatus[None]
) -> None:
    await serve(small.app, HttpConfig(drain_timeout=0.1), sockets=[listener], stop=stop, task_status=task_status)


async def connect(path: Path) -> trio.SocketStream:
    return await trio.open_unix_socket(str(path))


@trio_test
async def test_answers_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with served(SmallApp(), path):
        for request, status in [
            (http_request("/quick", headers=CLOSE), 200),
            (http_request("/echo", {"a": 1}, headers=CLOSE), 200),
            (http_request("/nothing", headers=CLOSE), 404),
            (b"nonsense\r\n\r\n", 400),
        ]:
            async with await connect(path) as stream:
                await stream.send_all(request)
                assert parse_answer(await read_all(stream)).status == status


@trio_test
async def test_a_client_that_leaves_is_not_worked_for(tmp_path: Path) -> None:
    small, path = SmallApp(), tmp_path / "s"
    async with served(small, path):
        stream = await connect(path)
        await stream.send_all(http_request("/hang"))
        await read_until(stream, EVENT)
        assert small.is_working()
        await stream.aclose()
        await until(lambda: small.cancelled == 1)


@trio_test
async def test_a_shutdown_ends_a_stream_with_an_error(tmp_path: Path) -> None:
    small, path = SmallApp(), tmp_path / "s"
    async with served(small, path) as stop, await connect(path) as stream:
        await stream.send_all(http_request("/hang"))
        await read_until(stream, EVENT)
        stop.set()
        assert b"shutting down" in await read_all(stream)
