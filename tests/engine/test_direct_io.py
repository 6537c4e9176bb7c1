"""Sending and receiving over real sockets, and over streams that are none."""

import os
import socket
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from llmd.engine.direct_io import Sender, receive_some

LARGE = os.urandom(1 << 22)  # more than any socket takes at once


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(20):
            await test()

    trio.run(bounded)


def socket_streams() -> tuple[trio.SocketStream, trio.SocketStream]:
    one, other = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    return one, other


async def send_forever(sender: Sender) -> None:
    while True:
        await sender.send_rest()


async def read(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await receive_some(stream, 1 << 18)
    return data


def test_what_a_socket_takes_is_sent_without_any_task() -> None:
    async def test() -> None:
        ours, theirs = socket_streams()
        sender = Sender(ours)
        sender.put(b"first")
        sender.put(b"second")
        assert sender.has_sent_all
        assert theirs.socket.fileno() >= 0
        assert os.read(theirs.socket.fileno(), 100) == b"firstsecond"

    run(test)


@pytest.mark.parametrize("make_streams", [socket_streams, trio.testing.memory_stream_pair], ids=["socket", "memory"])
def test_everything_arrives_in_order_however_slowly_it_is_read(
    make_streams: Callable[[], tuple[trio.abc.Stream, trio.abc.Stream]],
) -> None:
    async def test() -> None:
        ours, theirs = make_streams()
        sender = Sender(ours)
        parts = [b"first", LARGE, b"third", LARGE[:1000], b"fifth"]
        async with trio.open_nursery() as nursery:
            for part in parts[:2]:
                sender.put(part)
            assert not sender.has_sent_all
            nursery.start_soon(send_forever, sender)
            await trio.testing.wait_all_tasks_blocked()
            # nothing that comes now may pass by what is being sent
            for part in parts[2:]:
                sender.put(part)
            assert await read(theirs, sum(map(len, parts))) == b"".join(parts)
            await sender.wait_all_sent()
            assert sender.has_sent_all
            sender.put(b"and more")
            assert await read(theirs, 8) == b"and more"
            nursery.cancel_scope.cancel()

    run(test)


def test_the_task_finds_out_that_nobody_is_there() -> None:
    async def test() -> None:
        ours, theirs = socket_streams()
        sender = Sender(ours)
        await theirs.aclose()
        sender.put(b"lost")
        with pytest.raises(trio.BrokenResourceError):
            await sender.send_rest()
        sender.put(b"lost too")

    run(test)


def test_an_end_is_told_and_so_is_a_broken_connection() -> None:
    async def test() -> None:
        ours, theirs = socket_streams()
        await theirs.send_eof()
        assert await receive_some(ours, 100) == b""
        async with trio.open_nursery() as nursery:
            listener, *_ = await trio.open_tcp_listeners(0, host="127.0.0.1")
            client = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
            server = await listener.accept()
            # closing with data unread resets the connection
            await client.send_all(b"unread")
            await trio.lowlevel.wait_readable(server.socket)
            await server.aclose()
            with pytest.raises(trio.BrokenResourceError):
                await receive_some(client, 100)
            nursery.cancel_scope.cancel()

    run(test)
