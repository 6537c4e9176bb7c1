"""Those who only make trouble: clients that leave at once, and such as send what is no request, or read nothing.

What becomes of them is nobody's business, as long as the others do not notice.
"""

import asyncio
import json
import re
import socket
import ssl
import struct
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Literal

from soaking.questions import Question, in_some_manner
from soaking.report import Report

Leaving = Literal["FIN", "RST", "half-close"]
_LEAVINGS: tuple[Leaving, ...] = ("FIN", "RST", "half-close")

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
_PATIENCE = 3.0  # seconds that a sender of nonsense waits for an answer

_POST = b"POST /v1/completions HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\n"

NONSENSE: dict[str, bytes] = {
    "no JSON": _POST + b"content-length: 8\r\n\r\n{prompt:",
    "no UTF-8": _POST + b'content-length: 14\r\n\r\n{"prompt":"\xff\xfe"',
    "deep JSON": _POST + b"content-length: 20000\r\n\r\n" + b"[" * 20000,
    "wrong content type": _POST.replace(b"application/json", b"image/png") + b"content-length: 2\r\n\r\n{}",
    "half a head": _POST + b"x-half: ",
    "half a body": _POST + b'content-length: 4000\r\n\r\n{"prompt": "abc',
    "two lengths": _POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}x",
    "length and chunks": _POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "broken chunks": _POST + b"transfer-encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "endless head": b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 200_000,
    "garbage": bytes(range(256)) * 8,
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    "upgrade": b"GET /health HTTP/1.1\r\nhost: s\r\nconnection: upgrade\r\nupgrade: h2c\r\nhttp2-settings: !\r\n\r\n",
    "no version": b"GET /health\r\n\r\n",
    "pipeline": b"GET /health/live HTTP/1.1\r\nhost: soak\r\n\r\n" * 50,
    "nothing": b"",
}


@dataclass(frozen=True, slots=True)
class Door:
    """Where the server listens."""

    host: str
    port: int
    tls: ssl.SSLContext | None

    async def connect(self, *, limit: int = 1 << 16) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises OSError."""
        return await asyncio.open_connection(self.host, self.port, ssl=self.tls, limit=limit)


async def storm(door: Door, questions: list[Question], report: Report, random: Random) -> None:
    """Many clients that ask at once and leave within two seconds, each in its own way."""
    visits = [
        (_request(random.choice(questions), random), random.uniform(0, 2), random.choice(_LEAVINGS))
        for _ in range(random.randrange(40, 120))
    ]
    report.troublemakers["left at once"] += len(visits)
    await asyncio.gather(*(_visit(door, *visit) for visit in visits))


async def _visit(door: Door, request: bytes, seconds: float, leaving: Leaving) -> None:
    with suppress(OSError):
        _, writer = await door.connect()
        writer.write(request)
        await asyncio.sleep(seconds)
        if leaving == "half-close" and writer.can_write_eof():
            writer.write_eof()
            await asyncio.sleep(0.5)
        _leave(writer, with_reset=leaving == "RST")


async def talk_nonsense(door: Door, report: Report, random: Random) -> None:
    """All kinds of what is no request, in any order, several at once."""
    speeches = [*NONSENSE.values(), random.randbytes(random.randrange(1, 4000))] * 2
    random.shuffle(speeches)
    report.troublemakers["nonsense"] += len(speeches)
    await asyncio.gather(*(_talk(door, speech, report, with_reset=random.random() < 0.5) for speech in speeches))


async def _talk(door: Door, speech: bytes, report: Report, *, with_reset: bool) -> None:
    with suppress(OSError):
        reader, writer = await door.connect()
        writer.write(speech)
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                if found := _STATUS.match(await reader.read(1024)):
                    report.answers_to_nonsense[int(found[1])] += 1
        _leave(writer, with_reset=with_reset)


async def read_slowly(door: Door, question: Question, report: Report, random: Random) -> None:
    """Clients that ask for long streams and take nothing of them for a while; then they are gone."""
    num_clients = random.randrange(4, 12)
    report.troublemakers["slow readers"] += num_clients
    request = _request(question, random)
    await asyncio.gather(*(_dawdle(door, request, random.uniform(2, 6)) for _ in range(num_clients)))


async def _dawdle(door: Door, request: bytes, seconds: float) -> None:
    with suppress(OSError):
        # with so small a limit the reader stops reading the socket at once
        _, writer = await door.connect(limit=1)
        _socket(writer).setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        writer.write(request)
        await asyncio.sleep(seconds)
        _leave(writer, with_reset=True)


def _request(question: Question, random: Random) -> bytes:
    body = json.dumps(in_some_manner(question.body, random)).encode()
    head = _POST.replace(b"/completions", question.path.encode())
    return head + f"content-length: {len(body)}\r\n\r\n".encode() + body


def _leave(writer: asyncio.StreamWriter, *, with_reset: bool) -> None:
    if with_reset:
        _socket(writer).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    else:
        writer.close()


def _socket(writer: asyncio.StreamWriter) -> socket.socket:
    found: socket.socket = writer.get_extra_info("socket")
    return found
