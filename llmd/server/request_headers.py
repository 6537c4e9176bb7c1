"""What a request's headers say about its work: its name, who asks, how long it may take. Knows nothing of the body."""

import re
import uuid

from quart import request

from llmd.errors import InvalidRequest
from llmd.server.api_keys import identity

TIMEOUT_HEADER = "X-Request-Timeout"

# what may be sent back as it came: nothing that could start another header or break a log line
_REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)


def request_name(given: str = "") -> str:
    """The client's own X-Request-Id, if it can be sent back safely, else a new one."""
    return given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


def client_identity() -> str:
    """Who asks, as `api_keys.identity` has it."""
    return identity(request.headers.get("Authorization"))


def header_timeout() -> float | None:
    """The seconds of X-Request-Timeout, if it is there. Raises InvalidRequest if it is no positive number."""
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        timeout = float(given)
    except ValueError:
        timeout = 0.0
    # a NaN is not greater than zero either
    if not timeout > 0.0:
        raise InvalidRequest(f"The header {TIMEOUT_HEADER} must be a number of seconds greater than zero.")
    return timeout
