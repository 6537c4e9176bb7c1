"""Clients that know only sockets, so that they can leave in every way there is, and a proxy that leaves for them."""

import json
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer

Address = tuple[str, int]


def address(server: RunningServer) -> Address:
    parts = urlsplit(server.url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


CLOSE = "Connection: close\r\n"


def request_bytes(body: dict[str, Any], *, headers: str = "") -> bytes:
    """A completion asked for in HTTP/1.1. `headers`: more of them, each with its end of line."""
    data = json.dumps(body).encode()
    headers += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return f"POST /v1/completions HTTP/1.1\r\nHost: test\r\n{headers}\r\n".encode() + data


def connect(to: Address) -> socket.socket:
    return socket.create_connection(to, timeout=START_TIMEOUT)


def read_until(connection: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        received = connection.recv(1 << 16)
        assert received, f"the server closed after {data!r}"
        data += received
    return data


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes; a reset counts as that."""
    data = b""
    with suppress(ConnectionResetError):
        while received := connection.recv(1 << 16):
            data += received
    return data


def fin(connection: socket.socket) -> None:
    # a plain close would send a reset if there is something unread
    connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def rst(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    """Say that nothing more will be sent, and wait for the other side to end too."""
    connection.shutdown(socket.SHUT_WR)
    read_all(connection)
    connection.close()


class Relay:
    """A proxy for bytes. When its client goes, it closes the way to the server: politely before it lets go of the
    client, or with a reset after it."""

    def __init__(self, upstream: Address, *, resets: bool) -> None:
        self._upstream = upstream
        self._resets = resets
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address: Address = self._listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        # wakes `accept`
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._relay, args=(client, connect(self._upstream)), daemon=True).start()

    def _relay(self, client: socket.socket, upstream: socket.socket) -> None:
        with selectors.DefaultSelector() as selector, suppress(OSError):
            selector.register(client, selectors.EVENT_READ, upstream)
            selector.register(upstream, selectors.EVENT_READ, client)
            while True:
                for key, _ in selector.select():
                    source, target = key.fileobj, key.data
                    assert isinstance(source, socket.socket)
                    data = source.recv(1 << 16)
                    if not data:
                        raise ConnectionResetError
                    target.sendall(data)
        if self._resets:
            client.close()
            rst(upstream)
        else:
            upstream.close()
            client.close()


@dataclass(frozen=True)
class Way:
    """How a client comes and leaves."""

    connect: Callable[[], socket.socket]
    leave: Callable[[socket.socket], None]


WAYS = ("fin", "rst", "half-close", "proxy", "resetting proxy")


@contextmanager
def all_ways(server: RunningServer) -> Iterator[dict[str, Way]]:
    """Every one of `WAYS`, by name."""
    to = address(server)
    proxies = [Relay(to, resets=False), Relay(to, resets=True)]
    direct = [Way(lambda: connect(to), leave) for leave in (fin, rst, half_close)]
    # of its two proxies a client leaves the polite one politely
    proxied = [
        Way(lambda: connect(proxies[0].address), fin),
        Way(lambda: connect(proxies[1].address), rst),
    ]
    try:
        yield dict(zip(WAYS, direct + proxied, strict=True))
    finally:
        for proxy in proxies:
            proxy.close()
