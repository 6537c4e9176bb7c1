"""Bytes of a request body → request struct, or an `InvalidRequest` that names the field. Knows no HTTP, no ranges."""

import re
from difflib import get_close_matches
from typing import TypeVar

import msgspec

from llmd.errors import InvalidRequest
from llmd.server.openai_types import IGNORED, REFUSED

Request = TypeVar("Request", bound=msgspec.Struct)

# While a body is decoded nothing else runs in this process. So much takes a tenth of a second on a slow core; the
# largest context there is fits in as token ids, and any text that `max_body_bytes` lets in.
MAX_ITEMS = 2_000_000  # of lists and objects: what stands behind a comma
MAX_PARTS = 200_000  # texts, keys, lists and objects: each costs as much as ten numbers

MAX_HARMLESS = 256  # bytes of the JSON of a value of `REFUSED`

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_AT = re.compile(r" - at `(?:key` in `)?\$(?P<path>.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>.*)`")
_MISSING = re.compile(r"Object missing required field `(?P<field>.*)`")


def decode_request(body: bytes, request_type: type[Request]) -> Request:
    """The body as a `request_type`. A null at the top level is the same as no such key.

    Only what the type names is built; the rest is skipped over. Raises InvalidRequest: no JSON object, one of more
    than `MAX_ITEMS` or `MAX_PARTS`, or a key that is unknown, refused, missing or of the wrong type.
    """
    known = request_type.__struct_fields__
    fields: dict[str, msgspec.Raw] = {}
    for name, value in _read_object(body).items():
        if name in IGNORED or _is_null(value):
            continue
        if name in known:
            fields[name] = value
        else:
            _refuse(name, value, known)
    return _decode(fields, request_type)


def _read_object(body: bytes) -> dict[str, msgspec.Raw]:
    """The object in the body, its values not yet decoded. Of a repeated key the last counts."""
    if not body or body.isspace():
        raise InvalidRequest("The request body is empty; send a JSON object.")
    _check_extent(body)
    try:
        if not body.isascii():
            # what is skipped over is not looked at
            body.decode()
        return msgspec.json.decode(body.removeprefix(_BYTE_ORDER_MARK), type=dict[str, msgspec.Raw])
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The request body is not valid UTF-8: {error.reason} at byte {error.start}.") from None
    except msgspec.ValidationError:
        raise InvalidRequest("The request body must be a JSON object.") from None
    except msgspec.MsgspecError as error:
        raise _not_json(error) from None
    except RecursionError:
        raise _too_deep() from None


def _is_null(value: msgspec.Raw) -> bool:
    # only a short one is copied
    return memoryview(value).nbytes == len(b"null") and bytes(value) == b"null"


def _check_extent(body: bytes) -> None:
    """Raise InvalidRequest for a body that would take too long to decode."""
    if body.count(b",") <= MAX_ITEMS and sum(map(body.count, (b'"', b"[", b"{"))) <= MAX_PARTS:
        return  # even if all of them count, and none is part of a text
    num_items, num_parts = _extent(body)
    for count, limit, what in (
        (num_items, MAX_ITEMS, "values in lists and objects"),
        (num_parts, MAX_PARTS, "texts, keys, lists and objects"),
    ):
        if count > limit:
            raise InvalidRequest(
                f"The request body has more than {limit} {what}, which is the most this server takes. Send less at "
                "once; a long prompt may be sent as one text."
            )


def _extent(body: bytes) -> tuple[int, int]:
    """How many items and parts there are in valid JSON; of other bytes, up to where they cease to be that."""
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # every quote left begins or ends a text
    num_texts = bare.count(b'"') // 2
    if num_texts > MAX_PARTS:
        return 0, num_texts
    between_texts = b"".join(bare.split(b'"')[::2])
    return between_texts.count(b","), num_texts + between_texts.count(b"[") + between_texts.count(b"{")


def _refuse(name: str, raw: msgspec.Raw, known: tuple[str, ...]) -> None:
    """Raises unless the parameter is one of `REFUSED` with a value that asks for nothing."""
    if name not in REFUSED:
        raise _unknown(name, "", candidates=[*known, *IGNORED, *REFUSED])
    value = _short_value(raw)
    if not any(type(value) is type(harmless) and value == harmless for harmless in REFUSED[name]):
        raise InvalidRequest(
            f"The parameter '{name}' is not supported by this server. Please remove it.",
            param=name,
            code="unsupported_parameter",
        )


def _short_value(raw: msgspec.Raw) -> object:
    """The value, if it is short, as all are that ask for nothing; else something that is like none of them."""
    try:
        return msgspec.json.decode(raw) if memoryview(raw).nbytes <= MAX_HARMLESS else raw
    except msgspec.MsgspecError:
        return raw  # JSON, but a number that no float can hold


def _unknown(name: str, path: str, candidates: list[str]) -> InvalidRequest:
    close = get_close_matches(name[:64], candidates, n=1)
    suggestion = f" Did you mean '{close[0]}'?" if close else ""
    shown = name if len(name) <= 64 else name[:64] + "…"
    return InvalidRequest(
        f"Unknown parameter: '{path}{shown}'.{suggestion}", param=f"{path}{shown}", code="unknown_parameter"
    )


def _decode(fields: dict[str, msgspec.Raw], request_type: type[Request]) -> Request:
    try:
        return msgspec.json.decode(msgspec.json.encode(fields), type=request_type)
    except msgspec.ValidationError as error:
        raise _translate(str(error)) from None
    except msgspec.MsgspecError as error:
        raise _not_json(error) from None
    except RecursionError:
        raise _too_deep() from None


def _not_json(error: msgspec.MsgspecError) -> InvalidRequest:
    return InvalidRequest(f"The request body is not valid JSON: {error}.")


def _too_deep() -> InvalidRequest:
    return InvalidRequest("The request body is not acceptable: it is nested too deeply.")


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
