"""What every route shares: errors, request names, health, and the documents about the API."""

import json
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import trio
from quart import Response
from trio.testing import trio_test

from llmd.config import HttpConfig, ModelConfig, ServerConfig
from llmd.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailed,
    InvalidApiKey,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    StartupFailed,
    Unavailable,
)
from llmd.protocol.control import Stage, SystemState
from llmd.protocol.generation import EngineReady
from llmd.server import health
from llmd.server.app import ROUTES, create_app
from llmd.server.context import Server, StateBoard
from llmd.server.engine_client import EngineClient
from llmd.server.error_handlers import error_body, render
from llmd.server.metrics import Metrics
from tests.server.live import SOON

NO_TEXT: Any = object()  # stands for a text model where only its presence matters
READY = EngineReady(max_model_len=512, block_size=16, num_blocks=64, vocab_size=264)


def make_server(**http: Any) -> Server:
    config = ServerConfig(
        model=ModelConfig(cache_dir="", served_names=("tiny",)),
        http=HttpConfig(**http),
        listen_fds=(),
        engine_path="engine.sock",
    )
    return Server(config=config, state=StateBoard(), engine=EngineClient("engine.sock"), metrics=Metrics("tiny"))


def client_of(server: Server) -> Any:
    return create_app(server).test_client()


async def error_of(response: Any) -> dict[str, Any]:
    assert response.content_type == "application/json"
    error: dict[str, Any] = json.loads(await response.get_data())["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return error


# --- errors


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v1/chat/completion", 404, "Did you mean '/v1/chat/completions'?"),
        ("POST", "/chat/completions", 404, "Did you mean '/v1/chat/completions'?"),
        ("GET", "/nothing/like/it", 404, "GET /docs lists"),
        ("GET", "/v1/chat/completions", 405, "only OPTIONS, POST"),
        ("DELETE", "/health", 405, "only GET, HEAD, OPTIONS"),
        ("POST", "/tokenize", 415, "Content-Type: application/json"),
    ],
)
@trio_test
async def test_errors_outside_of_routes(method: str, path: str, status: int, words: str) -> None:
    response = await client_of(make_server()).open(path, method=method)
    assert response.status_code == status
    error = await error_of(response)
    assert words in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", None)
    assert ("allow" in response.headers) == (status == 405)


@trio_test
async def test_request_before_the_model_is_there() -> None:
    server = make_server()
    server.state.update(SystemState(stage=Stage.FETCHING, detail="downloading model.safetensors"))
    response = await client_of(server).post("/v1/completions", json={"prompt": "x"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "downloading model.safetensors" in (await error_of(response))["message"]


@trio_test
async def test_who_comes_during_a_restart_is_told_how_long_the_last_start_took() -> None:
    server = make_server()
    server.text = NO_TEXT
    for load_seconds, told in ((2.5, "3"), (600.0, "60"), (None, "1")):
        server.state.update(SystemState(stage=Stage.RESTARTING, restarts=1, load_seconds=load_seconds))
        response = await client_of(server).post("/v1/completions", json={"prompt": "x"})
        assert (response.status_code, response.headers["retry-after"]) == (503, told)
        assert "restarting" in (await error_of(response))["message"]


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (InvalidRequest("m", param="top_p", code="c"), 400, "invalid_request_error", "top_p", "c"),
        (InvalidRequest("m"), 400, "invalid_request_error", None, None),
        (ContextLengthExceeded("m", param="p"), 400, "invalid_request_error", "p", "context_length_exceeded"),
        (ModelNotFound("m"), 404, "invalid_request_error", "model", "model_not_found"),
        (InvalidApiKey("m"), 401, "invalid_request_error", None, "invalid_api_key"),
        (Overloaded("m", retry_after=2.5), 429, "rate_limit_error", None, "rate_limit_exceeded"),
        (Unavailable("m"), 503, "server_error", None, "engine_overloaded"),
        (DeadlineExceeded("m"), 408, "invalid_request_error", None, "deadline_exceeded"),
        (EngineFailed("m"), 500, "server_error", None, None),
    ],
)
def test_what_llmd_raises_on_purpose(
    error: Exception, status: int, kind: str, param: str | None, code: str | None
) -> None:
    expected = {"error": {"message": "m", "type": kind, "param": param, "code": code}}
    assert render(error).status == status
    assert json.loads(error_body(error)) == expected


def test_retry_after_is_whole_seconds_rounded_up() -> None:
    assert render(Overloaded("m", retry_after=2.5)).headers == {"retry-after": "3"}
    assert render(Unavailable("m", retry_after=0.01)).headers == {"retry-after": "1"}


@pytest.mark.parametrize(
    "error", [KeyError("secret"), StartupFailed("secret"), ExceptionGroup("g", [OSError("secret")])]
)
def test_the_unforeseen_says_nothing_to_the_client(error: Exception) -> None:
    assert render(error).status == 500
    assert b"secret" not in error_body(error)


def test_a_group_is_its_most_severe_member_whatever_the_order() -> None:
    members = [InvalidRequest("a"), Unavailable("b"), Overloaded("c", retry_after=1)]
    for first in range(3):
        turned = [*members[first:], *members[:first]]
        assert render(ExceptionGroup("", [ExceptionGroup("", turned[:2]), turned[2]])).content.error.message == "b"


@pytest.mark.parametrize("error", [KeyError("secret"), ExceptionGroup("g", [KeyError("secret")])])
@trio_test
async def test_a_route_that_fails(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(server: Server) -> Response:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(health, "Health", fail)  # whatever /health does next fails
        with caplog.at_level(logging.ERROR):
            response = await client_of(make_server()).get("/health/live")
    assert response.status_code == 500
    assert (await error_of(response))["message"].startswith("Internal error")
    assert "Traceback" in caplog.text


# --- request names


@trio_test
async def test_request_id_is_sent_back_or_made() -> None:
    client = client_of(make_server())
    response = await client.get("/version", headers={"X-Request-Id": "trace-1/a"})
    assert response.headers["x-request-id"] == "trace-1/a"
    made = set()
    for given in ("", "a b", "x" * 129, "ü"):
        for path in ("/version", "/missing"):
            response = await client.get(path, headers={"X-Request-Id": given})
            made.add(response.headers["x-request-id"])
    assert len(made) == 8
    assert all(re.fullmatch("req_[0-9a-f]{32}", each) for each in made)


# --- health


@trio_test
async def test_health_tells_the_truth_at_every_stage() -> None:
    server = make_server()
    client = client_of(server)

    async def ask(path: str = "/health") -> tuple[int, str | None, Any]:
        response = await client.get(path)
        return response.status_code, response.headers.get("retry-after"), json.loads(await response.get_data())

    nothing = {"detail": "", "progress": None, "restarts": 0, "queue_age": 0.0}
    assert await ask() == (503, "1", {**nothing, "status": "starting"})
    server.state.update(SystemState(stage=Stage.LOADING, detail="loading weights", progress=0.5))
    loading = {**nothing, "status": "loading", "detail": "loading weights", "progress": 0.5}
    assert await ask() == (503, "1", loading)
    assert await ask("/health/ready") == (503, "1", loading)
    assert (await ask("/health/live"))[0] == 200
    # the engine may be ready before this process is
    server.state.update(SystemState(stage=Stage.READY))
    assert (await ask())[0] == 503
    assert (await ask())[2]["detail"] == "loading the tokenizer"
    server.text, server.engine.ready = NO_TEXT, READY
    assert await ask() == (200, None, {**nothing, "status": "ok"})
    # this process may know sooner than the supervisor that the engine is gone
    server.engine.ready = None
    lost = {**nothing, "status": "restarting", "detail": "the connection to the engine is lost"}
    assert await ask() == await ask("/health/ready") == (503, "1", lost)
    assert (await ask("/health/live"))[0] == 200
    server.engine.ready = READY
    for stage in (Stage.RESTARTING, Stage.DRAINING):
        server.state.update(SystemState(stage=stage, restarts=1))
        assert (await ask())[::2] == (503, {**nothing, "status": stage, "restarts": 1})
    # nobody should wait for a failed server
    server.state.update(SystemState(stage=Stage.FAILED, detail="out of memory"))
    assert (await ask())[:2] == (503, None)


@trio_test
async def test_nobody_misses_a_state() -> None:
    board = StateBoard()
    seen = []

    async def watch(task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await board.wait_changed()
        seen.append(board.current.stage)

    async with trio.open_nursery() as nursery:
        await nursery.start(watch)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(SOON):
            board.update(SystemState(stage=Stage.READY))
    assert seen == [Stage.READY]


@pytest.mark.parametrize("stage", [Stage.FAILED, Stage.DRAINING])
def test_no_request_begins_when_it_cannot_end(stage: Stage) -> None:
    server = make_server()
    server.text = NO_TEXT
    assert server.loaded_text() is NO_TEXT
    server.state.update(SystemState(stage=stage, detail="because"))
    with pytest.raises(Unavailable):
        server.loaded_text()


# --- documents


async def openapi(server: Server) -> Any:
    return json.loads(await (await client_of(server).get("/openapi.json")).get_data())


@trio_test
async def test_every_route_is_in_the_document() -> None:
    server = make_server()
    document = await openapi(server)
    assert document["openapi"] == "3.1.0"
    rules = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in create_app(server).url_map.iter_rules()
        for method in rule.methods or ()
        if method not in ("HEAD", "OPTIONS")
    }
    operations = {
        (path, method): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert set(operations) == rules
    assert len(rules) == len(ROUTES)
    assert len({operation["operationId"] for operation in operations.values()}) == len(ROUTES)
    for (path, _), operation in operations.items():
        assert operation["tags"] == ["default"]
        assert operation["summary"]
        assert "500" in operation["responses"]
        names = {
            place: [each["name"] for each in operation["parameters"] if each["in"] == place]
            for place in ("path", "header")
        }
        assert names["path"] == re.findall(r"\{(\w+)\}", path)
        generates = path in ("/v1/chat/completions", "/v1/completions")
        assert names["header"] == ["X-Request-Id", *(["X-Request-Timeout"] if generates else [])]


def visit(value: Any, see: Callable[[dict[str, Any]], None]) -> None:
    if isinstance(value, dict):
        see(value)
        for each in value.values():
            visit(each, see)
    elif isinstance(value, list):
        for each in value:
            visit(each, see)


@trio_test
async def test_every_reference_leads_somewhere() -> None:
    """quart-schema, which would make such a document too, leaves nested structs out of it."""
    document = await openapi(make_server())
    references = []
    visit(document, lambda each: references.append(each["$ref"]) if isinstance(each.get("$ref"), str) else None)
    assert "#/components/schemas/ChatMessage" in references
    for reference in references:
        place = document
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]


@pytest.mark.parametrize("path", ["/", "/docs"])
@trio_test
async def test_pages_load_nothing_from_elsewhere(path: str) -> None:
    response = await client_of(make_server()).get(path)
    page = (await response.get_data()).decode()
    assert response.content_type == "text/html; charset=utf-8"
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", page)
    assert "default-src 'none'" in response.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/health", "/version", "/v1/models", "/metrics"])
@trio_test
async def test_head_and_options(path: str) -> None:
    client = client_of(make_server())
    got, head, options = await client.get(path), await client.head(path), await client.options(path)
    assert head.status_code == got.status_code
    assert set(options.headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}


@trio_test
async def test_trailing_slash_is_no_redirect() -> None:
    assert (await client_of(make_server()).get("/version/")).status_code == 200
