"""The two pages for people: what this is, and the API to read and to try. They load nothing from elsewhere."""

from pathlib import Path

from quart import Response
from quart_trio.wrappers import TrioResponse

from llmd.server.context import Server

_STATIC = Path(__file__).parent / "static"
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
}


async def index(server: Server) -> Response:
    """The page that a browser sees first."""
    return _page("index.html")


async def docs(server: Server) -> Response:
    """This API, to read and to try."""
    return _page("docs.html")


def _page(name: str) -> Response:
    # a few kilobytes, a few times a day: not worth a thread or a cache
    return TrioResponse((_STATIC / name).read_bytes(), 200, _HEADERS, content_type="text/html; charset=utf-8")
