"""Reads a request's body. Does not know what is in it."""

from quart import request
from werkzeug.exceptions import UnsupportedMediaType


async def read_json_body() -> bytes:
    """The whole body, not yet decoded.

    Raises (all of them rendered by `error_handlers`): 415 if it is not declared to be JSON, 413 if it is larger than
    `max_body_bytes`, 408 if it does not come in within `body_timeout`.
    """
    if not request.is_json:
        raise UnsupportedMediaType
    body = await request.get_data(cache=False)
    assert isinstance(body, bytes)
    return body
