"""Exception → status and OpenAI error object: the one place that knows how a failure looks to a client."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches

import msgspec
from msgspec import Struct
from quart import current_app, request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse
from werkzeug import exceptions as http

from llmd.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidApiKey,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Unavailable,
)

_log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()


class ErrorObject(Struct, frozen=True):
    """What went wrong, in OpenAI's words. All four keys are always there."""

    message: str  # for people: the cause, and the remedy where there is one
    type: str
    param: str | None  # the field of the request at fault
    code: str | None  # for programs


class ErrorResponse(Struct, frozen=True):
    """The body of every answer that is not a success."""

    error: ErrorObject


@dataclass(frozen=True, slots=True)
class Rendered:
    """A failure as an HTTP answer."""

    status: int
    content: ErrorResponse
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        return _encoder.encode(self.content)


@dataclass(frozen=True, slots=True)
class _Kind:
    status: int
    type: str
    code: str | None = None


_CLIENT = "invalid_request_error"
_SERVER = "server_error"

# the nearest ancestor of an exception's type decides; an InvalidRequest brings its own code
_KINDS: dict[type[BaseException], _Kind] = {
    InvalidRequest: _Kind(400, _CLIENT),
    ModelNotFound: _Kind(404, _CLIENT),
    InvalidApiKey: _Kind(401, _CLIENT, "invalid_api_key"),
    Overloaded: _Kind(429, "rate_limit_error", "rate_limit_exceeded"),
    Unavailable: _Kind(503, _SERVER, "engine_overloaded"),
    DeadlineExceeded: _Kind(408, _CLIENT, "deadline_exceeded"),
    EngineFailed: _Kind(500, _SERVER),
    http.BadRequest: _Kind(400, _CLIENT, "bad_request"),
    http.NotFound: _Kind(404, _CLIENT, "unknown_url"),
    http.MethodNotAllowed: _Kind(405, _CLIENT, "method_not_supported"),
    http.RequestTimeout: _Kind(408, _CLIENT, "request_timeout"),
    http.RequestEntityTooLarge: _Kind(413, _CLIENT, "request_too_large"),
    http.UnsupportedMediaType: _Kind(415, _CLIENT, "unsupported_media_type"),
    http.RequestHeaderFieldsTooLarge: _Kind(431, _CLIENT, "headers_too_large"),
    http.NotImplemented: _Kind(501, "not_supported_error", "not_implemented"),
    http.HTTPVersionNotSupported: _Kind(505, _CLIENT, "http_version_not_supported"),
    BaseException: _Kind(500, _SERVER, "internal_error"),
}


def render(error: BaseException) -> Rendered:
    """The answer to a failure. Of a group, the most severe member counts, whatever the order in it."""
    error = max(_leaves(error), key=lambda leaf: (_kind(leaf).status, type(leaf).__name__, str(leaf)))
    kind = _kind(error)
    param, code = (error.param, error.code) if isinstance(error, InvalidRequest) else (None, kind.code)
    headers = {}
    if isinstance(error, InvalidApiKey):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, Overloaded | Unavailable) and error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, DeadlineExceeded):
        # openai's client sends a 408 again unless it is told not to, and no longer wants the answer by now
        headers["x-should-retry"] = "false"
    if isinstance(error, http.MethodNotAllowed) and error.valid_methods:
        headers["allow"] = ", ".join(sorted(error.valid_methods))
    content = ErrorResponse(ErrorObject(message=_message(error), type=kind.type, param=param, code=code))
    return Rendered(kind.status, content, headers)


def error_struct(error: BaseException) -> ErrorResponse:
    """The error object of a failure, to be put into something else."""
    return render(error).content


def error_body(error: BaseException) -> bytes:
    """The error object of a failure as JSON, for the `data:` of a stream that has begun already."""
    return render(error).body


def error_response(error: BaseException) -> TrioResponse:
    """The answer to a failure; one that nobody foresaw goes to the log with its trace."""
    if _is_unforeseen(error):
        _log.error("a request failed", exc_info=error)
    rendered = render(error)
    return TrioResponse(rendered.body, rendered.status, rendered.headers, content_type="application/json")


def register_error_handlers(app: QuartTrio) -> None:
    """For what fails outside of a route: no such path or method, and Quart's own mistakes."""

    async def answer_http(error: http.HTTPException) -> TrioResponse:
        return error_response(explain(error))

    async def answer_any(error: Exception) -> TrioResponse:
        return error_response(error)

    app.register_error_handler(http.HTTPException, answer_http)
    app.register_error_handler(Exception, answer_any)


def explain(error: http.HTTPException) -> http.HTTPException:
    """Give Werkzeug's exception the words that help: needs the request that it is about."""
    match error:
        case http.NotFound():
            error.description = f"There is no {request.path!r} here.{_did_you_mean(request.path)}"
        case http.MethodNotAllowed(valid_methods=methods):
            allowed = ", ".join(sorted(methods or ()))
            error.description = f"{request.path} does not answer {request.method}, only {allowed}."
        case http.RequestTimeout():
            seconds = current_app.config["BODY_TIMEOUT"]
            error.description = f"The request body did not come in within {seconds:g} seconds."
        case http.RequestEntityTooLarge():
            limit = current_app.config["MAX_CONTENT_LENGTH"]
            error.description = f"The request body is larger than {limit} bytes, which is the most this server takes."
        case http.UnsupportedMediaType() if error.description == http.UnsupportedMediaType.description:
            given = f"not as {request.mimetype!r}" if request.mimetype else "and say so"
            error.description = f"Send the body as JSON, {given}: add the header 'Content-Type: application/json'."
    return error


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from _leaves(member)
    else:
        yield error


def _kind(error: BaseException) -> _Kind:
    return next(_KINDS[ancestor] for ancestor in type(error).__mro__ if ancestor in _KINDS)


def _message(error: BaseException) -> str:
    if _is_unforeseen(error):
        return "Internal error. The server's log says more."
    if isinstance(error, http.HTTPException):
        return error.description or error.name
    return str(error)


def _is_unforeseen(error: BaseException) -> bool:
    return any(_kind(leaf) is _KINDS[BaseException] for leaf in _leaves(error))


def _did_you_mean(path: str) -> str:
    paths = [rule.rule for rule in current_app.url_map.iter_rules() if not rule.arguments]
    nearest = get_close_matches(path, paths, n=1, cutoff=0.7)
    return f" Did you mean {nearest[0]!r}?" if nearest else " GET /docs lists what there is."
