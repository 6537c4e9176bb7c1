"""A real server on a real socket for the length of a block, and a client that says exactly the bytes it is told."""

import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from llmd.config import HttpConfig
from llmd.server.serving import serve
from tests.server.certificates import shared_certificates

# with or without TLS
Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]

# for what must happen soon; generous, because the machine may be busy
SOON = 10.0


@dataclass(frozen=True)
class LiveServer:
    port: int
    stop: trio.Event
    stopped: trio.Event  # `serve` has returned
    client_context: ssl.SSLContext | None = None  # None = it speaks HTTP without TLS

    async def connect(self, *, receive_buffer: int | None = None) -> Stream:
        """A connection, after the handshake if there is one."""
        stream = await self.connect_socket(receive_buffer=receive_buffer)
        if self.client_context is None:
            return stream
        encrypted = trio.SSLStream(stream, self.client_context, server_hostname="localhost", https_compatible=True)
        with trio.fail_after(SOON):
            await encrypted.do_handshake()
        return encrypted

    async def connect_socket(self, *, receive_buffer: int | None = None) -> trio.SocketStream:
        client = trio.socket.socket()
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await client.connect(("127.0.0.1", self.port))
        return trio.SocketStream(client)

    async def say(self, request: bytes) -> bytes:
        """Everything that the server answers to these bytes, until it closes."""
        async with await self.connect() as stream:
            await stream.send_all(request)
            return await read_all(stream)


@asynccontextmanager
async def live_server(app: Any, config: HttpConfig | None = None, *, tls: bool = False) -> AsyncIterator[LiveServer]:
    """The application on a port of its own; on leaving, the server has stopped."""
    config = config or HttpConfig()
    client_context = None
    if tls:
        certificates = shared_certificates()
        client_context = certificates.client_context()
        config = msgspec.structs.replace(
            config, ssl_certfile=str(certificates.certfile), ssl_keyfile=str(certificates.keyfile)
        )
    async with listen_and_serve(app, config, client_context) as server:
        yield server


@asynccontextmanager
async def listen_and_serve(
    app: Any, config: HttpConfig, client_context: ssl.SSLContext | None = None
) -> AsyncIterator[LiveServer]:
    """The same with exactly this configuration; clients connect with the context, if there is one."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    # so that a client that does not read is felt soon
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
    stop, stopped = trio.Event(), trio.Event()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        await serve(app, config, sockets=[listener], stop=stop, task_status=task_status)
        stopped.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        yield LiveServer(listener.getsockname()[1], stop, stopped, client_context)
        nursery.cancel_scope.cancel()


def http_request(
    path: str, body: object = None, *, method: str | None = None, headers: str = "", version: str = "1.1"
) -> bytes:
    """A request as a careful client writes it; with a body it is a POST of JSON."""
    data = b"" if body is None else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    if body is not None:
        headers += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return f"{method} {path} HTTP/{version}\r\nHost: test\r\n{headers}\r\n".encode() + data


CLOSE = "Connection: close\r\n"


async def read_all(stream: Stream) -> bytes:
    """Until the server closes; a reset counts as that."""
    data = bytearray()
    with trio.fail_after(SOON):
        try:
            async for chunk in stream:
                data += chunk
        except trio.BrokenResourceError:
            pass
    return bytes(data)


async def read_until(stream: Stream, end: bytes) -> bytes:
    data = b""
    with trio.fail_after(SOON):
        while end not in data:
            chunk = await stream.receive_some()
            assert chunk, f"the server closed after {data!r}"
            data += chunk
    return data


def reset(stream: Stream) -> None:
    """Close so that the server gets an RST instead of a FIN."""
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    transport.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.socket.close()


async def until(condition: Any) -> None:
    """Wait until `condition()` holds, letting everything else run."""
    with trio.fail_after(SOON):
        while not condition():
            await trio.sleep(0.005)


@dataclass(frozen=True)
class HttpAnswer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def parse_answer(data: bytes) -> HttpAnswer:
    """The first answer in these bytes (its body is all the rest, unless it has a length)."""
    head, _, body = data.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "content-length" in headers:
        body = body[: int(headers["content-length"])]
    return HttpAnswer(int(status_line.split()[1]), headers, body)
