"""Bytes of a request body → request struct, or an `InvalidRequest` that names the field. Knows no HTTP, no ranges."""

import re
from difflib import get_close_matches
from typing import Any, TypeVar

import msgspec

from llmd.errors import InvalidRequest
from llmd.server.openai_types import IGNORED, REFUSED

Request = TypeVar("Request", bound=msgspec.Struct)

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_AT = re.compile(r" - at `(?:key` in `)?\$(?P<path>.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>.*)`")
_MISSING = re.compile(r"Object missing required field `(?P<field>.*)`")


def decode_request(body: bytes, request_type: type[Request]) -> Request:
    """The body as a `request_type`. A null at the top level is the same as no such key.

    Raises InvalidRequest: no JSON object, or a key that is unknown, refused, missing or of the wrong type.
    """
    fields = _decode_object(body)
    given = {name: value for name, value in fields.items() if value is not None and name not in IGNORED}
    known = request_type.__struct_fields__
    for name, value in given.items():
        if name not in known:
            _refuse(name, value, known)
    return _convert({name: value for name, value in given.items() if name in known}, request_type)


def _decode_object(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise InvalidRequest("The request body is empty; send a JSON object.")
    try:
        value = msgspec.json.decode(body.removeprefix(_BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The request body is not valid UTF-8: {error.reason} at byte {error.start}.") from None
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.") from None
    except RecursionError:
        raise InvalidRequest("The request body is not acceptable: it is nested too deeply.") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    return value


def _refuse(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raises unless the parameter is one of `REFUSED` with a value that asks for nothing."""
    if name not in REFUSED:
        raise _unknown(name, "", candidates=[*known, *IGNORED, *REFUSED])
    if not any(type(value) is type(harmless) and value == harmless for harmless in REFUSED[name]):
        raise InvalidRequest(
            f"The parameter '{name}' is not supported by this server. Please remove it.",
            param=name,
            code="unsupported_parameter",
        )


def _unknown(name: str, path: str, candidates: list[str]) -> InvalidRequest:
    close = get_close_matches(name[:64], candidates, n=1)
    suggestion = f" Did you mean '{close[0]}'?" if close else ""
    shown = name if len(name) <= 64 else name[:64] + "…"
    return InvalidRequest(
        f"Unknown parameter: '{path}{shown}'.{suggestion}", param=f"{path}{shown}", code="unknown_parameter"
    )


def _convert(fields: dict[str, Any], request_type: type[Request]) -> Request:
    try:
        return msgspec.convert(fields, request_type)
    except msgspec.ValidationError as error:
        raise _translate(str(error)) from None
    except RecursionError:
        raise InvalidRequest("The request body is not acceptable: it is nested too deeply.") from None


def _translate(problem: str) -> InvalidRequest:
    """msgspec's words, "Expected `int`, got `str` - at `$.messages[0].role`", as an OpenAI error."""
    at = _AT.search(problem)
    param = ".".join(re.findall(r"[^.\[\]]+", at["path"])) if at else ""
    problem = problem[: at.start()] if at else problem
    path = f"{param}." if param else ""
    if unknown := _UNKNOWN.fullmatch(problem):
        return _unknown(unknown["field"], path, candidates=[])
    if missing := _MISSING.fullmatch(problem):
        name = f"{path}{missing['field']}"
        return InvalidRequest(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    return InvalidRequest(
        f"Invalid value for '{param}': {problem[:1].lower()}{problem[1:]}.", param=param or None, code="invalid_type"
    )
