"""The OpenAPI 3.1 document, made of the routes and the structs that they name. Knows no request."""

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from llmd import __version__
from llmd.server.error_handlers import ErrorResponse
from llmd.server.request_headers import TIMEOUT_HEADER
from llmd.server.route import Route

Json = dict[str, Any]

_REQUEST_ID_HEADER = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "Names the request in the answer's header of the same name and in logs; without it, a new name.",
    "schema": {"type": "string", "maxLength": 128},
}
_TIMEOUT_HEADER = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "description": "Seconds from the request's arrival to its last token; the shorter of this and `timeout` counts.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}

_PARAMETER = re.compile(r"<(?:\w+:)?(?P<name>\w+)>")
_ERROR_SCHEMA = {"$ref": "#/components/schemas/ErrorResponse"}


def openapi_document(routes: Sequence[Route]) -> Json:
    """The document as JSON values."""
    schemas = _Schemas(routes)
    paths: dict[str, Json] = {}
    for route in routes:
        path = _PARAMETER.sub(r"{\g<name>}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmd", "version": __version__, "description": "An open-weights model over the OpenAI API."},
        "paths": paths,
        "tags": [{"name": "default"}],
        # a server without keys takes any; clients that always send one need not be told otherwise
        "security": [{}, {"bearer": []}],
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


class _Schemas:
    """The JSON schemas of every struct that a route names, with references between them."""

    def __init__(self, routes: Sequence[Route]) -> None:
        named = [each for route in routes for each in (route.body, route.result, route.unready)]
        types = list(dict.fromkeys([*(each for each in named if each is not None), ErrorResponse]))
        schemas, self.components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
        self._by_type = dict(zip(types, schemas, strict=True))

    def content(self, struct: Any) -> Json:
        return {"application/json": {"schema": self._by_type[struct]}}


def _operation(route: Route, schemas: _Schemas) -> Json:
    operation: Json = {
        "operationId": route.operation_id,
        "tags": ["default"],
        "summary": route.summary,
        "parameters": _parameters(route),
        "responses": _responses(route, schemas),
    }
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": schemas.content(route.body)}
    return operation


def _parameters(route: Route) -> list[Json]:
    """The parts of the path that vary, and the headers that have an effect."""
    names = _PARAMETER.findall(route.path)
    in_path = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    return [*in_path, _REQUEST_ID_HEADER, *([_TIMEOUT_HEADER] if route.streams else [])]


def _responses(route: Route, schemas: _Schemas) -> Json:
    content = schemas.content(route.result) if route.result is not None else {route.content_type: {}}
    if route.streams:
        content["text/event-stream"] = {"schema": {"type": "string", "description": "With `stream`: `data:` events."}}
    responses: Json = {"200": {"description": "OK", "content": content}}
    for status in (*(() if route.is_open else (401,)), *route.errors, 500):
        error = {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
        responses[str(status)] = error
    if route.unready is not None:
        responses["503"] = {"description": "Not ready yet", "content": schemas.content(route.unready)}
    return responses
