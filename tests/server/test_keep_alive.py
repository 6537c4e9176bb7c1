"""A stream that has nothing to say says so, and real clients do not mind."""

import json
from pathlib import Path

import httpx
import openai
import pytest
import trio

from llmd.config import HttpConfig
from llmd.server.streaming import KEEP_ALIVE
from tests.server.fake_engine import ANSWER, application, run, say
from tests.server.live import http_request, live_server, read_until

STREAM = {"prompt": "abc", "stream": True}


@pytest.mark.parametrize(
    ("keep_alive", "stall_after", "timeout", "num_comments"),
    [(1.0, 0, 6.5, 6), (1.0, 3, 6.5, 6), (1.0, 3, 0.9, 0), (3.0, 3, 6.5, 2), (0.0, 3, 6.5, 0)],
)
def test_comments_while_nothing_comes(
    keep_alive: float, stall_after: int, timeout: float, num_comments: int, tiny_model_dir: Path
) -> None:
    """The engine gives so many tokens and then none, until the request's own time is over."""

    async def main() -> None:
        http = HttpConfig(sse_keep_alive=keep_alive)
        async with application(tiny_model_dir, http=http, stall_after=stall_after) as running:
            body = json.dumps({**STREAM, "timeout": timeout}).encode()
            answered = await running.request("POST", "/v1/completions", body, content_type="application/json")
            *events, done, _ = bytes(answered.body).split(b"\n\n")
            comments = [event for event in events if event + b"\n\n" == KEEP_ALIVE]
            assert len(comments) == num_comments
            assert done == b"data: [DONE]"
            others = [json.loads(event.removeprefix(b"data: ")) for event in events if event not in comments]
            if stall_after:
                assert others[-1]["choices"][0]["finish_reason"] == "length"
                assert sum(bool(event["choices"][0]["text"]) for event in others) == stall_after
            else:
                assert [event["error"]["code"] for event in others] == ["deadline_exceeded"]

    run(main)


def test_no_comment_while_data_flows(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, http=HttpConfig(sse_keep_alive=0.001)) as running:
            body = json.dumps(STREAM).encode()
            answered = await running.request("POST", "/v1/completions", body, content_type="application/json")
            assert KEEP_ALIVE not in answered.body

    run(main)


def test_headers_go_out_before_the_first_token(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with (
            application(tiny_model_dir, stall_after=0) as running,
            live_server(running.app) as server,
            await server.connect() as client,
        ):
            await client.send_all(http_request("/v1/completions", STREAM))
            head = await read_until(client, b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert b"x-request-id: req_" in head.lower()
            assert b"data:" not in head

    run(main, uses_threads=True)


def test_what_is_refused_before_the_stream_has_its_status(tiny_model_dir: Path) -> None:
    """A full queue, a prompt that cannot fit: no 200 and no stream, whatever `stream` says."""

    async def main() -> None:
        http = HttpConfig(max_num_queued_reqs=1)
        async with application(tiny_model_dir, http=http, stall_after=0) as running, trio.open_nursery() as nursery:
            too_long = {**STREAM, "prompt": "x" * 600}
            assert (await running.post("/v1/completions", too_long))[0] == 400
            gone = trio.Event()

            async def wait_in_queue() -> None:
                body = json.dumps(STREAM).encode()
                await running.request("POST", "/v1/completions", body, content_type="application/json", gone=gone)

            nursery.start_soon(wait_in_queue)
            await running.engine.wait_until(lambda: bool(running.engine.received))
            assert (await running.post("/v1/completions", STREAM))[0] == 429
            gone.set()

    run(main)


def test_real_clients_do_not_see_the_comments(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with (
            application(
                tiny_model_dir, http=HttpConfig(sse_keep_alive=0.02), stall_after=4, script=say(ANSWER)
            ) as running,
            live_server(running.app) as server,
            trio.open_nursery() as nursery,
        ):
            seen: list[str] = []

            def ask_with_openai() -> None:
                client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="EMPTY", max_retries=0)
                with client.completions.create(model="tiny", prompt="abc", stream=True, max_tokens=100) as chunks:
                    seen.append("".join(chunk.choices[0].text for chunk in chunks))

            async def ask_with_httpx() -> None:
                """When this one has had comments, the other has as well: then the engine goes on."""
                lines, num_comments = [], 0
                async with (
                    httpx.AsyncClient() as client,
                    client.stream(
                        "POST", f"http://127.0.0.1:{server.port}/v1/completions", json={**STREAM, "max_tokens": 100}
                    ) as answer,
                ):
                    async for line in answer.aiter_lines():
                        num_comments += line.startswith(":")
                        if num_comments == 3 and running.engine.stall_after is not None:
                            running.engine.stall_after = None
                            async with running.engine.changed:
                                running.engine.changed.notify_all()
                        if line.startswith("data: {"):
                            lines.append(json.loads(line.removeprefix("data: ")))
                seen.append("".join(event["choices"][0]["text"] for event in lines))
                assert num_comments >= 3

            with trio.fail_after(10):
                nursery.start_soon(trio.to_thread.run_sync, ask_with_openai)
                await running.engine.wait_until(lambda: len(running.engine.received) == 1)
                await ask_with_httpx()
                while len(seen) < 2:
                    await trio.sleep(0.005)
            assert seen == [ANSWER, ANSWER]

    run(main, uses_threads=True)
