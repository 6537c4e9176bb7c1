"""HTTP/2 (RFC 9113) on top of the h2 library, each request through Hypercorn's ASGI side. Knows nothing of sockets.

Hypercorn's own class for it is not used: it keeps a tree of priorities that clients may grow, and lets the tasks of the
requests write, so that cancelling one could leave half a frame for all. Here one task writes, whatever becomes of a
request.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import h2.events
import trio
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, EndBody, InformationalResponse, Request, Response, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.typing import AppWrapper, ConnectionState, TaskGroup, WorkerContext
from hypercorn.utils import filter_pseudo_headers
from werkzeug.exceptions import HTTPException

from llmd.config import SECONDS
from llmd.server.error_handlers import render
from llmd.server.http2_limits import (
    IDLE_FRAMES_PER_SECOND,
    MAX_FRAME,
    MAX_HEADER_TABLE,
    MAX_IDLE_FRAMES,
    Allowance,
    fault,
    is_idle,
    limited_connection,
)
from llmd.server.request_headers import request_name

Headers = Sequence[tuple[bytes, bytes]]

# bytes of one answer that wait for the client to allow more
MAX_PENDING = 1 << 16
# bytes that wait for the socket, before no more is read of this client
MAX_UNSENT = 1 << 16
# for a client to finish an upload that was answered before its end
UPLOAD_GRACE = 2 * SECONDS


class _Stream:
    """One request, and what its answer has that is not yet sent."""

    def __init__(self, http: HTTPStream | None) -> None:
        self.http = http  # None = it is refused without asking the application
        self.pending = bytearray()
        self.is_received = False  # the request, to its end
        self.ends = False  # nothing comes after what is pending
        self.is_framed = False  # the answer, to its end
        self.is_sent = False  # the same, to the kernel
        self.is_closed = False
        # whoever waits for the client to take something
        self.moved = trio.lowlevel.ParkingLot()


class Http2Protocol:
    """One connection's requests, all at once.

    Whatever a client does wrong on the connection ends it with a GOAWAY, and all its requests; other connections do not
    notice. A request that can be read but not served gets an OpenAI error object. A client's own GOAWAY counts as its
    leaving. A stream whose client takes nothing for the write timeout is reset; the others go on.
    """

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        *,
        context: WorkerContext,
        tasks: TaskGroup,
        state: ConnectionState,
        client: tuple[str, int] | None,
        server: tuple[str, int] | None,
        send: Callable[[Event], Awaitable[None]],
        write_timeout: float,
    ) -> None:
        self._app = app
        self._config = config
        self._context = context
        self._tasks = tasks
        self._state = state
        self._client = client
        self._server = server
        self._send = send
        self._write_timeout = write_timeout
        self._h2 = limited_connection()
        self._streams: dict[int, _Stream] = {}
        # streams that may have something to send, in turn
        self._ready: dict[int, None] = {}
        # streams that are answered while their request still comes in, and until when it may
        self._uploads: dict[int, float] = {}
        self._unsent = bytearray()
        self._written = trio.lowlevel.ParkingLot()
        self._has_work = trio.Event()
        self._idle_frames = Allowance(burst=MAX_IDLE_FRAMES, per_second=IDLE_FRAMES_PER_SECOND)
        # the connection ends with the last answer
        self._is_draining: bool = context.terminated.is_set()
        self._is_ending = False
        self._h2.initiate_connection()
        tasks.spawn(self._write)

    async def handle(self, event: Event) -> None:
        """Take in bytes, or the end of the connection. Waits while the client does not read what they led to."""
        if isinstance(event, RawData):
            await self._take_in(event.data)
        elif isinstance(event, Closed):
            await self._finish(ErrorCodes.NO_ERROR)

    def drain(self) -> None:
        """Close once no request runs. Until then also new ones get their answer, be it that this server shuts down.

        The GOAWAY comes with the last answer, though the RFC would allow it at once: httpx, and with it the `openai`
        package, gives up everything that runs when it sees one.
        """
        self._is_draining = True
        if not self._streams:
            self._end(ErrorCodes.NO_ERROR)

    async def _take_in(self, data: bytes) -> None:
        if self._is_ending:
            return
        try:
            events = self._h2.receive_data(data)
        except ProtocolError:
            # h2 has prepared a GOAWAY that says which error it is
            await self._finish(None)
            return
        if not self._idle_frames.take(sum(map(is_idle, events))):
            await self._finish(ErrorCodes.ENHANCE_YOUR_CALM)
            return
        for event in events:
            # an event is older than those after it: the client may have closed the stream, or everything, since
            with suppress(ProtocolError):
                await self._handle_event(event)
        self._unsent += self._h2.data_to_send()
        self._has_work.set()
        while len(self._unsent) > MAX_UNSENT and not self._is_ending:
            await self._written.park()

    async def _handle_event(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived():
                await self._begin(event.stream_id, event.headers, has_body=event.stream_ended is None)
            case h2.events.DataReceived():
                stream = self._streams.get(event.stream_id)
                if stream is not None and stream.http is not None and event.data:
                    await stream.http.handle(Body(stream_id=event.stream_id, data=event.data))
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.StreamEnded():
                await self._note_end(event.stream_id)
            case h2.events.StreamReset():
                self._uploads.pop(event.stream_id, None)
                await self._close(event.stream_id)
            case h2.events.WindowUpdated():
                self._note_window(event.stream_id)
            case h2.events.RemoteSettingsChanged():
                self._h2.encoder.header_table_size = min(self._h2.encoder.header_table_size, MAX_HEADER_TABLE)
                self._note_window(0)
            case h2.events.ConnectionTerminated():
                await self._finish(None)

    async def _begin(self, stream_id: int, headers: Headers, *, has_body: bool) -> None:
        """A request has come in."""
        fields = dict(headers)
        if error := fault(fields, has_body=has_body):
            await self._add(stream_id, _Stream(None))
            self._tasks.spawn(self._refuse, stream_id, error)
            return
        if fields.get(b"expect", b"").lower() == b"100-continue":
            self._h2.send_headers(stream_id, [(b":status", b"100")])
        # not encrypted there is no HTTP/2 here
        http = HTTPStream(
            *(self._app, self._config, self._context, self._tasks, True),
            *(self._client, self._server, self._send_of_stream, stream_id),
        )
        await self._add(stream_id, _Stream(http))
        await http.handle(
            Request(
                stream_id=stream_id,
                headers=filter_pseudo_headers(list(headers)),
                http_version="2",
                method=fields[b":method"].decode().upper(),
                raw_path=fields[b":path"],
                state=self._state,
            )
        )

    async def _add(self, stream_id: int, stream: _Stream) -> None:
        if not self._streams:
            await self._send(Updated(idle=False))
        self._streams[stream_id] = stream

    async def _note_end(self, stream_id: int) -> None:
        """A request has come in to its end."""
        self._uploads.pop(stream_id, None)
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.is_received = True
            if stream.http is not None:
                await stream.http.handle(EndBody(stream_id=stream_id))

    async def _refuse(self, stream_id: int, error: HTTPException) -> None:
        rendered = render(error)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(rendered.body)),
            (b"x-request-id", request_name().encode()),
        ]
        await self._send_of_stream(Response(stream_id=stream_id, headers=headers, status_code=rendered.status))
        await self._send_of_stream(Body(stream_id=stream_id, data=rendered.body))
        await self._send_of_stream(EndBody(stream_id=stream_id))
        await self._send_of_stream(StreamClosed(stream_id=stream_id))

    async def _send_of_stream(self, event: StreamEvent) -> None:
        """What a request's answer wants of its stream."""
        stream = self._streams.get(event.stream_id)
        if stream is None:
            # the client is gone; whoever answers hears of it, if it lets others run
            await trio.lowlevel.checkpoint()
            return
        match event:
            case Response() | InformationalResponse():
                status = [(b":status", b"%d" % event.status_code)]
                with suppress(ProtocolError):
                    self._h2.send_headers(
                        event.stream_id, [*status, *event.headers, *self._config.response_headers("h2")]
                    )
                    self._has_work.set()
            case Body():
                stream.pending += event.data
                await self._push(event.stream_id, stream)
            case EndBody():
                stream.ends = True
                await self._push(event.stream_id, stream)
            case StreamClosed() if stream.is_sent:
                await self._close(event.stream_id)
            case StreamClosed():
                # whoever answers has given up in the middle: the client must not take it for the end
                await self._reset(event.stream_id, ErrorCodes.INTERNAL_ERROR)

    async def _push(self, stream_id: int, stream: _Stream) -> None:
        """Have the writer send what is pending. Waits while that is much, and for the end until it is sent."""
        self._ready[stream_id] = None
        self._has_work.set()
        while not stream.is_closed and (not stream.is_sent if stream.ends else len(stream.pending) > MAX_PENDING):
            with trio.move_on_after(self._write_timeout) as waiting:
                await stream.moved.park()
            if waiting.cancelled_caught:
                await self._reset(stream_id, ErrorCodes.CANCEL)
        await trio.lowlevel.checkpoint_if_cancelled()

    async def _write(self) -> None:
        """The one task that writes, until there will be nothing more to write."""
        while True:
            self._has_work = trio.Event()
            moved = self._fill()
            self._unsent += self._h2.data_to_send()
            if self._unsent:
                data, self._unsent = bytes(self._unsent), bytearray()
                await self._send(RawData(data))
                self._written.unpark_all()
                for stream in moved:
                    stream.is_sent = stream.is_framed
                    stream.moved.unpark_all()
            elif self._is_ending:
                break
            else:
                with trio.move_on_at(next(iter(self._uploads.values()), float("inf"))):
                    await self._has_work.wait()
                self._end_late_uploads()
        await self._send(Closed())

    def _fill(self) -> list[_Stream]:
        """Make frames of what is pending, as far as the client allows, one a stream in turn.

        Returns the streams that got on.
        """
        moved = []
        for stream_id in list(self._ready):
            del self._ready[stream_id]
            stream = self._streams.get(stream_id)
            if stream is None:
                continue
            # the client, or h2 itself, may have closed the stream since
            with suppress(ProtocolError):
                if self._send_some(stream_id, stream):
                    moved.append(stream)
        return moved

    def _send_some(self, stream_id: int, stream: _Stream) -> bool:
        """Whether anything of this stream could be sent."""
        window = self._h2.local_flow_control_window(stream_id)
        size = max(0, min(window, self._h2.max_outbound_frame_size, MAX_FRAME, len(stream.pending)))
        is_end = stream.ends and size == len(stream.pending)
        if size:
            self._h2.send_data(stream_id, bytes(stream.pending[:size]), end_stream=is_end)
        elif is_end:
            # needs no window
            self._h2.end_stream(stream_id)
        else:
            return False
        stream.is_framed = is_end
        del stream.pending[:size]
        if stream.pending:
            # behind the others
            self._ready[stream_id] = None
            self._has_work.set()
        return True

    def _note_window(self, stream_id: int) -> None:
        """The client allows more: on one stream, or (0) perhaps on all."""
        stream_ids = self._streams if stream_id == 0 else [stream_id]
        for each in stream_ids:
            stream = self._streams.get(each)
            if stream is not None and not stream.is_framed and (stream.pending or stream.ends):
                self._ready[each] = None

    def _end_late_uploads(self) -> None:
        now = trio.current_time()
        late = [stream_id for stream_id, deadline in self._uploads.items() if deadline <= now]
        for stream_id in late:
            del self._uploads[stream_id]
            with suppress(ProtocolError):
                self._h2.reset_stream(stream_id, ErrorCodes.NO_ERROR)

    async def _reset(self, stream_id: int, error: ErrorCodes) -> None:
        with suppress(ProtocolError):
            self._h2.reset_stream(stream_id, error)
        self._has_work.set()
        await self._close(stream_id)

    async def _close(self, stream_id: int) -> None:
        """The end of a request, whoever has ended it."""
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            return
        stream.is_closed = True
        stream.moved.unpark_all()
        if stream.is_sent and not stream.is_received:
            # the client may finish its upload: some throw an answer away that comes with a reset
            self._uploads[stream_id] = trio.current_time() + UPLOAD_GRACE
            self._has_work.set()
        if stream.http is not None:
            await stream.http.handle(StreamClosed(stream_id=stream_id))
        if not self._streams:
            if self._is_draining:
                self._end(ErrorCodes.NO_ERROR)
            await self._send(Updated(idle=True))

    async def _finish(self, error: ErrorCodes | None) -> None:
        """No more requests, and no more answers. None = the client needs no GOAWAY from here."""
        self._end(error)
        for stream_id in list(self._streams):
            await self._close(stream_id)

    def _end(self, error: ErrorCodes | None) -> None:
        """Nothing more is taken in, and the writer ends when it has nothing more."""
        if self._is_ending:
            return
        self._is_ending = True
        if error is not None:
            self._h2.close_connection(error)
        self._has_work.set()
        self._written.unpark_all()
