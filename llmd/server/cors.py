"""Which pages in a browser may use this server (CORS, as the Fetch standard has it). Knows no route.

Never with credentials: a browser's cookies and passwords mean nothing here, an API key is a header like another.
"""

from collections.abc import Sequence

from quart import Response, request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

_PREFLIGHT = {
    "access-control-allow-methods": "GET, HEAD, POST, OPTIONS",
    # `*` means every header but `authorization`, which must be named
    "access-control-allow-headers": "authorization, content-type, x-request-id, *",
    # seconds; no browser remembers an answer for longer than a day, most for two hours
    "access-control-max-age": "7200",
}


def register_cors(app: QuartTrio, origins: Sequence[str]) -> None:
    """Tell browsers that pages of these origins ("*": of all) may read what this application answers.

    A preflight is answered here, before anyone asks for an API key: browsers send none with it. No origins: no CORS,
    and an OPTIONS request is like any other.
    """
    if not origins:
        return
    allowed = frozenset(origins)

    async def answer_preflight() -> Response | None:
        is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if not is_preflight or "Origin" not in request.headers:
            return None
        headers = _PREFLIGHT if _shown_origin(allowed) else {}
        return TrioResponse(b"", 204, headers)

    async def name_origin(response: Response) -> Response:
        response.vary.add("Origin")
        if origin := _shown_origin(allowed):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
        return response

    app.before_request(answer_preflight)
    app.after_request(name_origin)


def _shown_origin(allowed: frozenset[str]) -> str | None:
    """The origin to let in, as the answer names it; None if the request's own is not allowed."""
    origin = request.headers.get("Origin")
    if origin is None:
        return None
    if "*" in allowed:
        return "*"
    return origin if origin in allowed else None
