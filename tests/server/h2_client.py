"""A client that speaks HTTP/2 over TLS, as well or as badly as a test wants."""

import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import h2.events
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from hyperframe.frame import Frame

from tests.server.live import SOON, LiveServer, Stream


@dataclass
class Answer:
    """What has come of one answer."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_complete: bool = False
    reset: int | None = None  # the error code of a RST_STREAM

    @property
    def is_over(self) -> bool:
        return self.is_complete or self.reset is not None

    def json(self) -> Any:
        return json.loads(self.body)


class H2Client:
    """One connection. Nothing is read but while one of the methods waits."""

    def __init__(self, stream: Stream, h2_connection: H2Connection, *, opens_windows: bool) -> None:
        self.stream = stream
        self.h2 = h2_connection
        self.answers: dict[int, Answer] = {}
        self.goaway: h2.events.ConnectionTerminated | None = None
        self.is_closed = False
        self.events: list[h2.events.Event] = []
        # whether the server may send more for what is read
        self.opens_windows = opens_windows

    async def flush(self) -> None:
        data = self.h2.data_to_send()
        with trio.fail_after(SOON):
            await self.stream.send_all(data)

    async def send_frames(self, frames: Iterable[Frame]) -> None:
        """Whatever they say; a server that has closed is not told."""
        try:
            with trio.fail_after(SOON):
                await self.stream.send_all(b"".join(frame.serialize() for frame in frames))
        except trio.BrokenResourceError:
            self.is_closed = True

    async def begin(
        self, path: str, body: object = None, *, method: str | None = None, headers: Any = (), end: bool = True
    ) -> int:
        """A request, of which the client's id is returned; with a body it is a POST of JSON."""
        data = b"" if body is None else json.dumps(body).encode()
        method = method or ("GET" if body is None else "POST")
        fields = [(":method", method), (":scheme", "https"), (":authority", "localhost"), (":path", path), *headers]
        if body is not None:
            fields += [("content-type", "application/json"), ("content-length", str(len(data)))]
        stream_id = await self.begin_with(fields, end=end and body is None)
        if body is not None:
            self.h2.send_data(stream_id, data, end_stream=end)
            await self.flush()
        return stream_id

    async def begin_with(self, fields: list[tuple[str, str]], *, end: bool = True) -> int:
        """A request with exactly these headers."""
        stream_id = self.h2.get_next_available_stream_id()
        self.answers[stream_id] = Answer()
        self.h2.send_headers(stream_id, fields, end_stream=end)
        await self.flush()
        return stream_id

    async def upload(self, stream_id: int, data: bytes, *, end: bool = True) -> None:
        """As much of a body as the server takes before it answers in full or resets."""
        while data and not self.answers[stream_id].reset:
            size = min(self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size, len(data))
            if size:
                self.h2.send_data(stream_id, data[:size], end_stream=end and size == len(data))
                data = data[size:]
                await self.flush()
            else:
                await self.read()

    async def read(self) -> None:
        """What has come in; waits for something."""
        with trio.fail_after(SOON):
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:
                data = b""
        if not data:
            self.is_closed = True
            return
        for event in self.h2.receive_data(data):
            self._note(event)
        if (data := self.h2.data_to_send()) and self.goaway is None:
            try:
                await self.stream.send_all(data)
            except trio.BrokenResourceError:
                self.is_closed = True

    def _note(self, event: h2.events.Event) -> None:
        self.events.append(event)
        match event:
            case h2.events.ResponseReceived(stream_id=stream_id, headers=headers):
                fields = {str(name): str(value) for name, value in headers}
                self.answers[stream_id].status = int(fields.pop(":status"))
                self.answers[stream_id].headers = fields
            case h2.events.DataReceived(stream_id=stream_id, data=data):
                self.answers[stream_id].body += data
                if self.opens_windows:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, stream_id)
            case h2.events.StreamEnded(stream_id=stream_id):
                self.answers[stream_id].is_complete = True
            case h2.events.StreamReset(stream_id=stream_id, error_code=code):
                self.answers[stream_id].reset = int(code)
            case h2.events.ConnectionTerminated():
                self.goaway = event

    async def until(self, condition: Callable[[], Any]) -> None:
        """Read until it holds. Fails if the server closes before."""
        while not condition():
            assert not self.is_closed, f"the server closed: {self.goaway}"
            await self.read()

    async def answer(self, stream_id: int) -> Answer:
        await self.until(lambda: self.answers[stream_id].is_over)
        return self.answers[stream_id]

    async def ask(self, path: str, body: object = None, **options: Any) -> Answer:
        return await self.answer(await self.begin(path, body, **options))

    async def read_to_end(self) -> None:
        """Until the server closes."""
        while not self.is_closed:
            await self.read()


@asynccontextmanager
async def h2_client(
    server: LiveServer,
    *,
    opens_windows: bool = True,
    validates: bool = True,
    receive_buffer: int | None = None,
    settings: dict[Any, int] | None = None,
) -> AsyncIterator[H2Client]:
    """A connection after the first settings of both sides; without `validates` it sends whatever headers it is told."""
    assert server.client_context is not None
    server.client_context.set_alpn_protocols(["h2"])
    async with await server.connect(receive_buffer=receive_buffer) as stream:
        assert isinstance(stream, trio.SSLStream)
        assert stream.selected_alpn_protocol() == "h2"
        config = H2Configuration(
            client_side=True,
            header_encoding="utf-8",
            validate_outbound_headers=validates,
            normalize_outbound_headers=validates,
        )
        connection = H2Connection(config)
        if settings:
            connection.local_settings.update(settings)
            connection.local_settings.acknowledge()
            connection.decoder.max_allowed_table_size = connection.local_settings.header_table_size
        connection.initiate_connection()
        client = H2Client(stream, connection, opens_windows=opens_windows)
        await client.flush()
        await client.until(lambda: any(isinstance(event, h2.events.SettingsAcknowledged) for event in client.events))
        yield client
