"""What a client may do on an HTTP/2 connection, and how much of it (RFC 9113 section 10.5). Sends nothing."""

import re

import h2.events
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes, Settings
from werkzeug.exceptions import BadRequest, HTTPException, NotImplemented

# requests of one connection at once; a client that begins more has its connection ended
MAX_STREAMS = 256
# of one request, as HPACK counts them: names and values, and 32 bytes a header
MAX_HEADER_LIST = 1 << 15
# bytes of one frame, in both directions; the least that the RFC allows
MAX_FRAME = 1 << 14
# bytes that the encoder of headers remembers, however many the client would allow
MAX_HEADER_TABLE = 1 << 12
# frames that make work and bring nothing, at once and per second; a client that sends more has its connection ended
MAX_IDLE_FRAMES = 1000
IDLE_FRAMES_PER_SECOND = 100.0

# what HTTP/1.1 accepts as well (RFC 9112 section 3.2, RFC 9110 section 9.1)
_PATH = re.compile(rb"[/*][!-~]*")
_METHOD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


def limited_connection() -> H2Connection:
    """A server's side of a connection, with these limits; its first frame says them to the client."""
    connection = H2Connection(H2Configuration(client_side=False, header_encoding=None))
    limits = {
        SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
        SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST,
        SettingCodes.MAX_FRAME_SIZE: MAX_FRAME,
    }
    connection.local_settings = Settings(client=False, initial_values=limits)
    # h2 would wait for the client to agree
    connection.decoder.max_header_list_size = MAX_HEADER_LIST
    return connection


def is_idle(event: h2.events.Event) -> bool:
    """Whether a frame brings nothing, and yet makes work: known ways to keep a server busy."""
    match event:
        case h2.events.DataReceived():
            return not event.data and event.stream_ended is None
        case h2.events.StreamReset() | h2.events.RemoteSettingsChanged() | h2.events.PingReceived():
            return True
        case h2.events.UnknownFrameReceived():
            return True
        case _:
            return False


def fault(fields: dict[bytes, bytes], *, has_body: bool) -> HTTPException | None:
    """Why a request that h2 lets pass cannot be served; None if it can."""
    if fields[b":method"] == b"CONNECT":
        return NotImplemented("This server is no proxy: it does not answer CONNECT.")
    if not _METHOD.fullmatch(fields[b":method"]):
        return BadRequest("This is not HTTP/2 that can be understood: the :method is none.")
    if not _PATH.fullmatch(fields[b":path"]):
        return BadRequest("This is not HTTP/2 that can be understood: the :path is not a path of ASCII characters.")
    if not has_body and int(fields.get(b"content-length", b"0")) > 0:
        return BadRequest("This is not HTTP/2 that can be understood: there is a Content-Length, but no body.")
    return None


class Allowance:
    """How often something may still happen: so often at once, and so often a second."""

    def __init__(self, *, burst: float, per_second: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._left = burst
        self._counted_at = trio.current_time()

    def take(self, count: int) -> bool:
        """Whether it may happen so many times now."""
        now = trio.current_time()
        self._left = min(self._burst, self._left + (now - self._counted_at) * self._per_second) - count
        self._counted_at = now
        return self._left >= 0
