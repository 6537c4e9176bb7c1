"""The routes that say what this server is and how it is. They answer while nothing is loaded, and touch no model."""

from msgspec import Struct
from quart import Response
from quart_trio.wrappers import TrioResponse

from llmd import __version__
from llmd.protocol.control import Stage
from llmd.server.context import Server
from llmd.server.exposition import CONTENT_TYPE, System, exposition, own_figures, own_queue_age
from llmd.server.figures import others
from llmd.server.responses import json_response

# a start takes seconds; who asks again sooner learns nothing
_RETRY_AFTER = 1  # seconds


class Health(Struct, frozen=True, kw_only=True):
    """Of GET /health. `status` is "ok", or the stage that stands between now and then."""

    status: str
    detail: str = ""  # for people: "downloading model.safetensors"
    progress: float | None = None  # 0 … 1 of this stage, where known
    restarts: int = 0  # of the engine, since the start
    queue_age: float = 0.0  # seconds that the oldest sequence here has waited for its first token; 0 = none waits


class Version(Struct, frozen=True):
    """200 of GET /version"""

    version: str


def stage_of(server: Server) -> tuple[Stage, str]:
    """How far the system is and a word about it, as this process sees it: it may know sooner than the supervisor."""
    state = server.state.current
    if state.stage is not Stage.READY:
        return state.stage, state.detail
    if server.text is None:
        return Stage.LOADING, "loading the tokenizer"
    if server.engine.ready is None:
        return Stage.RESTARTING, "the connection to the engine is lost"
    return Stage.READY, ""


async def health(server: Server) -> Response:
    """Ready to generate? 200, or 503 with what it is doing instead."""
    state = server.state.current
    now, detail = stage_of(server)
    queue_age = own_queue_age(server)
    if now is Stage.READY:
        return json_response(Health(status="ok", restarts=state.restarts, queue_age=queue_age))
    progress = state.progress if now is state.stage else None
    answer = Health(status=now, detail=detail, progress=progress, restarts=state.restarts, queue_age=queue_age)
    headers = {} if now is Stage.FAILED else {"retry-after": str(_RETRY_AFTER)}
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
    """What Prometheus collects, in its text format: of all server processes, whichever is asked."""
    system = System(
        version=__version__,
        started_at=server.config.started_at,
        stage=stage_of(server)[0],
        restarts=server.state.current.restarts,
    )
    text = exposition(server.metrics.model_labels, system, own_figures(server), await others(server.config))
    return TrioResponse(text, content_type=CONTENT_TYPE)
