"""Reads a request's body. Does not know what is in it."""

from quart import request
from werkzeug.exceptions import UnsupportedMediaType

from llmd.server.connection import held_body

_UTF_8 = frozenset({"utf-8", "utf8", "us-ascii"})


async def read_json_body() -> bytes:
    """The whole body, not yet decoded.

    The caller decodes it at once, and keeps nothing of it. Raises (all of them rendered by `error_handlers`): 415 if it
    is not declared to be JSON in UTF-8 as it is, 413 if it is larger than `max_body_bytes`, 408 if it does not come in
    within `body_timeout`, 429 if it finds no room beside the bodies of others.
    """
    if not request.is_json:
        raise UnsupportedMediaType
    charset = request.mimetype_params.get("charset", "utf-8")
    if charset.lower() not in _UTF_8:
        raise UnsupportedMediaType(f"JSON is UTF-8 (RFC 8259): send the body so, not as {charset[:64]!r}.")
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        # unpacked, a small body may be of any size
        raise UnsupportedMediaType(f"Send the body as it is, without 'Content-Encoding: {encoding[:64]}'.")
    body = await request.get_data(cache=False)
    assert isinstance(body, bytes)
    held = held_body()
    held.check()
    held.release()
    return body
