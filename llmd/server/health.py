"""The routes that say what this server is and how it is. They answer while nothing is loaded, and touch no model."""

from msgspec import Struct
from quart import Response
from quart_trio.wrappers import TrioResponse

from llmd import __version__
from llmd.protocol.control import Stage
from llmd.server.context import Server
from llmd.server.metrics import CONTENT_TYPE
from llmd.server.responses import json_response

# a start takes seconds; who asks again sooner learns nothing
_RETRY_AFTER = 1  # seconds


class Health(Struct, frozen=True, kw_only=True):
    """Of GET /health. `status` is "ok", or the stage that stands between now and then."""

    status: str
    detail: str = ""  # for people: "downloading model.safetensors"
    progress: float | None = None  # 0 … 1 of this stage, where known
    restarts: int = 0  # of the engine, since the start


class Version(Struct, frozen=True):
    """200 of GET /version"""

    version: str


async def health(server: Server) -> Response:
    """Ready to generate? 200, or 503 with what it is doing instead."""
    state = server.state.current
    if state.stage is Stage.READY and server.text is not None:
        return json_response(Health(status="ok", restarts=state.restarts))
    # the engine may be ready before this process has its tokenizer
    stage, detail = (
        (Stage.LOADING, "loading the tokenizer") if state.stage is Stage.READY else (state.stage, state.detail)
    )
    answer = Health(status=stage, detail=detail, progress=state.progress, restarts=state.restarts)
    headers = {} if stage is Stage.FAILED else {"retry-after": str(_RETRY_AFTER)}
    return json_response(answer, status=503, headers=headers)


async def live(server: Server) -> Response:
    """Does the process answer? 200 always: a restart would not help while it does."""
    return json_response(Health(status="ok", restarts=server.state.current.restarts))


async def ready(server: Server) -> Response:
    """The same as /health, under the name that orchestrators know."""
    return await health(server)


async def version(server: Server) -> Response:
    """The version of llmd."""
    return json_response(Version(__version__))


async def metrics(server: Server) -> Response:
    """What Prometheus collects, in its text format."""
    if server.engine.ready is not None:
        server.metrics.engine_ready(server.engine.ready)
    if server.engine.statistics is not None:
        server.metrics.engine_statistics(server.engine.statistics)
    return TrioResponse(server.metrics.render(), content_type=CONTENT_TYPE)
