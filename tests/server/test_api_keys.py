"""Who may come in: keys from flags and from a file that changes, and what is open without one."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from trio.testing import trio_test

from llmd.errors import InvalidApiKey
from llmd.server.api_keys import ApiKeys, bearer_token, key_digest, read_key_file
from llmd.server.app import ROUTES, create_app
from tests.server.live import CLOSE, http_request, live_server, parse_answer
from tests.server.test_app import client_of, make_server

KEY = "sk-correct-horse"
OTHER = "sk-battery-staple"
OPEN = {"/", "/docs", "/health", "/health/live", "/health/ready"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def lets_in(keys: ApiKeys, key: str) -> bool:
    try:
        keys.check(f"Bearer {key}")
    except InvalidApiKey:
        return False
    return True


def guarded(**http: Any) -> Any:
    return client_of(make_server(api_key_digests=(key_digest(KEY),), **http))


def replace(file: Path, content: str) -> None:
    """As an operator should: a new file in the place of the old one."""
    new = file.with_suffix(".new")
    new.write_text(content)
    os.replace(new, file)


# --- the header


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer abc", "abc"),
        ("bearer abc", "abc"),
        ("BEARER   abc ", "abc"),
        ("Bearer", None),
        ("Bearer ", None),
        ("Basic abc", None),
        ("abc", None),
        ("", None),
        (None, None),
    ],
)
def test_the_token_of_a_header(header: str | None, token: str | None) -> None:
    assert bearer_token(header) == token


# --- the application


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
@trio_test
async def test_everything_but_health_and_the_pages_asks_for_a_key(route: Any) -> None:
    path = route.path.replace("<path:model_id>", "tiny")
    response = await guarded().open(path, method=route.method)
    assert (response.status_code == 401) == (path not in OPEN)
    if path in OPEN:
        assert "www-authenticate" not in response.headers
    response = await guarded().open(path, method=route.method, headers=bearer(KEY))
    assert response.status_code != 401


@pytest.mark.parametrize(
    "headers",
    [{}, bearer(OTHER), bearer(KEY[:-1]), bearer(KEY + "x"), {"Authorization": f"Basic {KEY}"}, {"X-Api-Key": KEY}],
    ids=["none", "other", "shorter", "longer", "basic", "another header"],
)
@trio_test
async def test_the_refusal_is_openais_and_shows_no_key(headers: dict[str, str], caplog: Any) -> None:
    response = await guarded().get("/v1/models", headers=headers)
    body = (await response.get_data()).decode()
    error = json.loads(body)["error"]
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")
    assert "sk-" not in body + caplog.text


@pytest.mark.parametrize(("path", "method"), [("/nothing", "GET"), ("/v1/models", "OPTIONS"), ("/v1/models", "DELETE")])
@trio_test
async def test_who_has_no_key_learns_nothing(path: str, method: str) -> None:
    assert (await guarded().open(path, method=method)).status_code == 401
    assert (await guarded().open(path, method=method, headers=bearer(KEY))).status_code != 401


# other spellings of what is open, and of what is not: each with the methods by which it may be seen
OPEN_SPELLINGS = ("//health", "/health/", "/health%2f", "/%68ealth", "//", "/docs/", "/health?x", "http://test/health")
CLOSED_SPELLINGS = (
    *("//metrics", "/metrics/", "/%6detrics", "http://test/metrics", "//v1/models", "/v1/models?/health", "*"),
    *("/health/../metrics", "/health/%2e%2e/metrics", "/%2e%2e/metrics", "/docs/../metrics", "/health;/../metrics"),
    *("/health/live/x", "/health%00", "/HEALTH", "/.", "/%2e", "/v1/models/../../health", "/\\health", "/docs/x.js"),
)


@trio_test
async def test_no_odd_path_or_method_opens_the_door() -> None:
    """A route is open, not a path: however it is spelled, what can be seen without a key is an open route's answer."""
    app = create_app(make_server(api_key_digests=(key_digest(KEY),)))
    async with live_server(app) as server:

        async def status(method: str, path: str) -> int:
            return parse_answer(await server.say(http_request(path, method=method, headers=CLOSE))).status

        for method in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "X"):
            for path in CLOSED_SPELLINGS:
                assert await status(method, path) == 401, (method, path)
            for path in OPEN_SPELLINGS:
                expected = {"GET": {200, 503}, "HEAD": {200, 503}, "OPTIONS": {200}}.get(method, {401})
                assert await status(method, path) in expected, (method, path)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
@trio_test
async def test_head_and_options_are_no_way_in(route: Any, method: str) -> None:
    path = route.path.replace("<path:model_id>", "tiny")
    response = await guarded().open(path, method=method)
    assert (response.status_code == 401) == (path not in OPEN)


@trio_test
async def test_a_server_without_keys_takes_any() -> None:
    client = client_of(make_server())
    assert (await client.get("/v1/models")).status_code == 200
    assert (await client.get("/v1/models", headers=bearer("EMPTY"))).status_code == 200


@trio_test
async def test_a_body_is_not_read_for_who_has_no_key() -> None:
    response = await guarded(max_body_bytes=8).post("/v1/completions", data=b"x" * 100)
    assert response.status_code == 401


@trio_test
async def test_the_api_document_says_what_may_be_refused() -> None:
    response = await guarded().get("/openapi.json", headers=bearer(KEY))
    paths = json.loads(await response.get_data())["paths"]
    refusing = {path for path, methods in paths.items() for each in methods.values() if "401" in each["responses"]}
    assert refusing == set(paths) - OPEN


# --- the file


def test_keys_of_flags_and_file_are_all_valid(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n\n  {OTHER}  \r\nsk-third\n")
    keys = ApiKeys([key_digest(KEY)], str(file))
    assert all(lets_in(keys, key) for key in (KEY, OTHER, "sk-third"))
    assert not any(lets_in(keys, key) for key in ("# of the team", "sk-fourth", ""))


def test_a_file_that_changes_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    keys = ApiKeys([], str(file))
    assert lets_in(keys, KEY)
    replace(file, OTHER)
    assert not lets_in(keys, KEY)
    assert lets_in(keys, OTHER)
    with file.open("a") as appended:
        appended.write(f"\n{KEY}\n")
    assert lets_in(keys, KEY)
    assert lets_in(keys, OTHER)
    assert "sk-" not in caplog.text


@pytest.mark.parametrize("content", ["", "# nobody\n", "sk one two\n", "sk-ü\n", None])
def test_a_broken_file_changes_nothing(tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    keys = ApiKeys([], str(file))
    assert lets_in(keys, KEY)
    if content is None:
        file.unlink()
    else:
        replace(file, content)
    for _ in range(3):
        assert lets_in(keys, KEY)
        assert not lets_in(keys, OTHER)
    # said once, however often it is asked
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
    assert str(file) in caplog.text
    assert "sk" not in caplog.text.replace(str(file), "")
    replace(file, OTHER)
    assert lets_in(keys, OTHER)
    assert not lets_in(keys, KEY)


@pytest.mark.parametrize("content", ["", None])
def test_a_server_that_starts_beside_a_broken_file_is_closed(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    keys = ApiKeys([], str(file))
    assert keys.are_required
    assert not lets_in(keys, KEY)
    assert lets_in(ApiKeys([key_digest(KEY)], str(file)), KEY)


def test_a_pipe_is_no_key_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="regular file"):
        read_key_file(str(tmp_path / "pipe"))
