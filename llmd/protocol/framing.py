"""Length-prefixed msgpack frames, without I/O: bytes in, messages out."""

import struct
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

Message = TypeVar("Message")

_LENGTH = struct.Struct("<I")  # bytes of payload that follow
_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: object) -> bytes:
    """The message as one frame. Any msgspec-encodable value below 4 GiB."""
    payload = _encoder.encode(message)
    return _LENGTH.pack(len(payload)) + payload


class FrameDecoder(Generic[Message]):
    """Feed it bytes as they arrive; it yields each message once its whole frame is in.

    `message_type` is a struct type or a union of tagged ones. Raises msgspec.DecodeError on a foreign payload.
    """

    def __init__(self, message_type: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(message_type)
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Message]:
        self._buffer += data
        offset = 0
        try:
            while len(self._buffer) - offset >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(self._buffer, offset)
                end = offset + _LENGTH.size + size
                if len(self._buffer) < end:
                    return
                payload = bytes(self._buffer[offset + _LENGTH.size : end])
                offset = end
                yield self._decode(payload)
        finally:
            del self._buffer[:offset]

    def _decode(self, payload: bytes) -> Message:
        try:
            return self._decoder.decode(payload)
        except (UnicodeDecodeError, RecursionError) as error:
            # msgspec has no error of its own for these two
            raise msgspec.DecodeError(str(error)) from error
