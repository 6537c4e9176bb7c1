"""What a browser is told: nothing unless the operator asked for it, and never about credentials."""

from typing import Any

import pytest
from trio.testing import trio_test

from llmd.server.api_keys import key_digest
from tests.server.test_app import client_of, make_server

HOME = "https://chat.example.com"
ELSEWHERE = "https://evil.example.com"
KEY = "sk-correct-horse"


def client(*origins: str) -> Any:
    return client_of(make_server(allowed_origins=origins, api_key_digests=(key_digest(KEY),)))


def preflight(origin: str) -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }


def cors_headers(response: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in response.headers if name.lower().startswith("access-control-")}


def items(value: str) -> set[str]:
    return {item.strip().lower() for item in value.split(",")}


@trio_test
async def test_nothing_is_said_unless_asked_for() -> None:
    answer = await client().get("/health", headers={"Origin": HOME})
    refused = await client().options("/v1/models", headers=preflight(HOME))
    assert refused.status_code == 401
    assert cors_headers(answer) == cors_headers(refused) == {}
    assert "vary" not in answer.headers


@pytest.mark.parametrize(("allowed", "shown"), [(HOME, HOME), ("*", "*")])
@trio_test
async def test_a_preflight_needs_no_key(allowed: str, shown: str) -> None:
    response = await client(allowed).options("/v1/chat/completions", headers=preflight(HOME))
    told = cors_headers(response)
    assert response.status_code == 204
    assert await response.get_data() == b""
    assert told["access-control-allow-origin"] == shown
    assert items(told["access-control-allow-methods"]) >= {"get", "post"}
    # `*` alone leaves out `authorization`
    assert items(told["access-control-allow-headers"]) >= {"authorization", "content-type", "*"}
    assert int(told["access-control-max-age"]) > 0
    assert "access-control-allow-credentials" not in told
    assert response.headers["vary"] == "Origin"


@trio_test
async def test_another_origin_is_not_let_in() -> None:
    response = await client(HOME).options("/v1/models", headers=preflight(ELSEWHERE))
    assert response.status_code == 204
    assert cors_headers(response) == {}
    answer = await client(HOME).get("/health", headers={"Origin": ELSEWHERE})
    assert cors_headers(answer) == {}
    assert answer.headers["vary"] == "Origin"


@trio_test
async def test_only_a_preflight_is_let_in_without_a_key() -> None:
    plain = await client(HOME).options("/v1/models", headers={"Origin": HOME})
    assert plain.status_code == 401
    assert (await client("*").options("/v1/models")).status_code == 401


@pytest.mark.parametrize(("path", "status"), [("/health/live", 200), ("/v1/models", 401), ("/nothing", 401)])
@trio_test
async def test_a_page_may_read_answers_and_refusals(path: str, status: int) -> None:
    response = await client("https://other.example.com", HOME).get(path, headers={"Origin": HOME})
    assert response.status_code == status
    assert cors_headers(response)["access-control-allow-origin"] == HOME
    assert "x-request-id" in items(cors_headers(response)["access-control-expose-headers"])


@trio_test
async def test_who_is_no_browser_page_hears_nothing_of_origins() -> None:
    response = await client("*").get("/health/live")
    assert cors_headers(response) == {}
    # a cache in between must not give this answer to a page
    assert response.headers["vary"] == "Origin"
