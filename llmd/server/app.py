"""Builds the Quart-Trio application: every route, in one list. Opens no socket.

A route is a function `async def name(server: Server) -> Response`; a variable part of the path comes as a keyword
argument of that name. It may raise anything: `error_handlers` renders it.
"""

from collections.abc import Awaitable, Callable, Sequence

from quart import Response, g, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException

from llmd.server import access_log, chat, completions, docs_page, health, models, tokenization
from llmd.server.api_keys import ApiKeys
from llmd.server.connection import ClientConnection, hold
from llmd.server.context import Server
from llmd.server.cors import register_cors
from llmd.server.error_handlers import error_response, register_error_handlers
from llmd.server.health import Health, Version
from llmd.server.openai_responses import (
    ChatCompletion,
    Completion,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
)
from llmd.server.openai_types import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from llmd.server.openapi import openapi_document
from llmd.server.request_record import Listener, record_requests
from llmd.server.responses import json_response
from llmd.server.route import Route

_BODY_ERRORS = (400, 404, 408, 413, 415, 429, 503)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


async def openapi(server: Server) -> Response:
    """This document."""
    return json_response(openapi_document(ROUTES))


ROUTES = (
    Route(
        "POST",
        "/v1/chat/completions",
        chat.chat_completions,
        "Answer a conversation",
        body=ChatCompletionRequest,
        result=ChatCompletion,
        streams=True,
        errors=_BODY_ERRORS,
    ),
    Route(
        "POST",
        "/v1/completions",
        completions.completions,
        "Continue a text",
        body=CompletionRequest,
        result=Completion,
        streams=True,
        errors=_BODY_ERRORS,
    ),
    Route("GET", "/v1/models", models.list_models, "The models that are served here", result=ModelList),
    Route("GET", "/v1/models/<path:model_id>", models.get_model, "One of the models", result=ModelCard, errors=(404,)),
    Route(
        "POST",
        "/tokenize",
        tokenization.tokenize,
        "A text or a conversation as token ids",
        body=TokenizeRequest,
        result=TokenizeResponse,
        errors=_BODY_ERRORS,
    ),
    Route(
        "POST",
        "/detokenize",
        tokenization.detokenize,
        "Token ids as text",
        body=DetokenizeRequest,
        result=DetokenizeResponse,
        errors=_BODY_ERRORS,
    ),
    Route(
        "GET",
        "/health",
        health.health,
        "Ready to generate, or what comes before that",
        result=Health,
        unready=Health,
        is_open=True,
    ),
    Route("GET", "/health/live", health.live, "Does the process answer?", result=Health, is_open=True),
    Route("GET", "/health/ready", health.ready, "The same as /health", result=Health, unready=Health, is_open=True),
    Route("GET", "/metrics", health.metrics, "Figures for Prometheus", content_type="text/plain"),
    Route("GET", "/version", health.version, "The version of llmd", result=Version),
    Route("GET", "/openapi.json", openapi, "The description of this API", content_type="application/json"),
    Route("GET", "/docs", docs_page.docs, "This API, to read and to try", content_type="text/html", is_open=True),
    Route("GET", "/", docs_page.index, "A page that says what this is", content_type="text/html", is_open=True),
)


def create_app(server: Server, *, listeners: Sequence[Listener] = ()) -> QuartTrio:
    """The application; nothing of it is shared with another one. `listeners` hear of each request that has ended."""
    app = QuartTrio(__name__, static_folder=None)
    app.asgi_http_class = ClientConnection
    app.config["MAX_CONTENT_LENGTH"] = server.config.http.max_body_bytes
    app.config["BODY_TIMEOUT"] = server.config.http.body_timeout
    app.config["RESPONSE_TIMEOUT"] = None
    # a path means what it says: no redirects
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    for route in ROUTES:
        app.add_url_rule(route.path, route.operation_id, _view(route, server), methods=[route.method])
    register_error_handlers(app)
    _measure_requests(app, server)
    # in this order: a preflight brings no key
    register_cors(app, server.config.http.allowed_origins)
    _require_key(app, server)
    logged = [access_log.log_answer] if server.config.log.access_log else []
    record_requests(app, [*logged, *listeners])
    return app


def _view(route: Route, server: Server) -> Callable[..., Awaitable[Response]]:
    """The route as Quart calls it. Its failures are rendered here, since Quart has no fixed order for groups."""

    async def view(**path_arguments: str) -> Response:
        try:
            return await route.answer(server, **path_arguments)
        except HTTPException:
            raise  # `explain` has more to say of it
        except Exception as error:
            return error_response(error)

    return view


def _require_key(app: QuartTrio, server: Server) -> None:
    """An API key on everything that is not open, and on every path that is not here: who has none learns nothing."""
    keys = ApiKeys(server.config.http.api_key_digests, server.config.http.api_key_file)
    is_open = frozenset(route.operation_id for route in ROUTES if route.is_open)

    async def require_key() -> None:
        if request.endpoint not in is_open:
            keys.check(request.headers.get("Authorization"))

    app.before_request(require_key)


def _measure_requests(app: QuartTrio, server: Server) -> None:
    async def begin_request() -> None:
        g.http_request = server.metrics.http_request()
        hold(g.http_request)

    async def note_answer(response: Response) -> Response:
        handler = request.url_rule.rule if request.url_rule else "none"
        # a client may invent methods, and every label value is kept for ever
        method = request.method if request.method in _METHODS else "other"
        g.http_request.answered(handler=handler, method=method, status=response.status_code)
        return response

    app.before_request(begin_request)
    app.after_request(note_answer)
