"""More work than there is room or time for: a full queue, deadlines, and who asks."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trio
from quart import Response

from llmd.config import HttpConfig
from llmd.server.admission import MAX_RETRY_AFTER, UNKNOWN_RETRY_AFTER, Backlog, overloaded, rejection
from llmd.server.api_keys import key_digest
from tests.server.fake_engine import Answered, Application, application, parse_events, run, say
from tests.server.live import until

CHAT_PATH, COMPLETIONS_PATH = PATHS = ("/v1/chat/completions", "/v1/completions")
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def body_for(path: str, **fields: object) -> dict[str, object]:
    return {**CHAT, **fields} if "chat" in path else {"prompt": "Once", **fields}


async def post(app: Application, path: str, body: object, **request: Any) -> Answered:
    return await app.request("POST", path, json.dumps(body).encode(), content_type="application/json", **request)


async def go_on(app: Application, *, stall_after: int | None = None) -> None:
    """Let a stalled engine give more tokens, or all."""
    app.engine.stall_after = stall_after
    async with app.engine.changed:
        app.engine.changed.notify_all()


async def rejections(app: Application) -> dict[str, float]:
    text = (await app.request("GET", "/metrics")).body.decode()
    found = re.findall(r'^vllm:admission_rejections_total\{.*reason="(\w+)".*\} (\S+)$', text, re.M)
    return {reason: float(count) for reason, count in found if float(count)}


def as_openai_sees(answered: Answered) -> openai.APIStatusError:
    """The exception that OpenAI's own client makes of this answer."""
    headers = [(name.decode(), value.decode()) for name, value in answered.headers.items()]
    replay = httpx.MockTransport(
        lambda request: httpx.Response(answered.status, headers=headers, content=bytes(answered.body))
    )
    client = openai.OpenAI(
        api_key="x", base_url="http://test/v1", max_retries=0, http_client=httpx.Client(transport=replay)
    )
    with pytest.raises(openai.APIStatusError) as raised:
        client.completions.create(model="tiny", prompt="Once")
    return raised.value


# --- the bounded queue


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_full_queue_is_a_429_that_says_when_to_come_back(tiny_model_dir: Path, path: str, stream: bool) -> None:
    async def main() -> None:
        http = HttpConfig(max_num_queued_reqs=4)
        async with application(tiny_model_dir, http=http, stall_after=0) as app, trio.open_nursery() as nursery:
            nursery.start_soon(post, app, path, body_for(path, n=3, stream=stream))
            await app.engine.wait_until(lambda: len(app.engine.open) == 3)
            # n = 2 is one too many, n = 1 is not
            refused = await post(app, path, body_for(path, n=2, stream=stream))
            nursery.start_soon(post, app, path, body_for(path, stream=stream))
            await app.engine.wait_until(lambda: len(app.engine.open) == 4)
            assert (await post(app, path, body_for(path, stream=stream))).status == 429

            assert refused.status == 429
            assert int(refused.headers[b"retry-after"]) == UNKNOWN_RETRY_AFTER
            assert b"x-request-id" in refused.headers
            error = as_openai_sees(refused)
            assert isinstance(error, openai.RateLimitError)
            assert (error.type, error.code, error.param) == ("rate_limit_error", "rate_limit_exceeded", None)
            assert "3 sequences" in error.message
            assert "limit of 4 sequences" in error.message
            assert await rejections(app) == {"queued_reqs": 2.0}

            await go_on(app)
            await app.engine.wait_until(lambda: not app.engine.open)
            answered = await post(app, path, body_for(path, n=4, stream=stream))
            assert answered.status == 200
            assert app.engine.cancelled == []

    run(main)


def test_the_bound_is_exact_for_many_that_come_at_once(tiny_model_dir: Path) -> None:
    async def main() -> None:
        statuses: list[int] = []

        async def ask(app: Application, number: int) -> None:
            path = PATHS[number % 2]
            statuses.append((await post(app, path, body_for(path, stream=number % 3 == 0))).status)

        http = HttpConfig(max_num_queued_reqs=7)
        async with application(tiny_model_dir, http=http, stall_after=0) as app, trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(ask, app, number)
            await app.engine.wait_until(lambda: len(app.engine.open) == 7)
            await until(lambda: len(statuses) == 43)
            assert app.server.engine.backlog.num_sequences == 7
            await go_on(app)
        assert (statuses.count(429), statuses.count(200)) == (43, 7)
        assert app.server.engine.backlog.num_sequences == app.server.engine.backlog.num_tokens == 0

    run(main)


def test_prompt_tokens_count_once_for_each_choice(tiny_model_dir: Path) -> None:
    async def main() -> None:
        http = HttpConfig(max_num_queued_tokens=10)
        async with application(tiny_model_dir, http=http, stall_after=0) as app, trio.open_nursery() as nursery:
            nursery.start_soon(partial(app.complete, ["ab", "cd"]))
            nursery.start_soon(partial(app.complete, "abc", n=2))
            await app.engine.wait_until(lambda: len(app.engine.open) == 4)
            status, answer = await app.post(COMPLETIONS_PATH, {"prompt": "x"})
            assert status == 429
            assert "10 prompt tokens wait" in answer["error"]["message"]
            assert "limit of 10 prompt tokens" in answer["error"]["message"]
            assert await rejections(app) == {"queued_tokens": 1.0}
            await go_on(app)

    run(main)


def test_where_nothing_waits_every_request_may(tiny_model_dir: Path) -> None:
    async def main() -> None:
        http = HttpConfig(max_num_queued_reqs=2, max_num_queued_tokens=3)
        async with application(tiny_model_dir, http=http) as app:
            assert len((await app.complete(["abc", "def"], n=3))["choices"]) == 6

    run(main)


def test_what_has_its_first_token_waits_no_longer(tiny_model_dir: Path) -> None:
    async def main() -> None:
        http = HttpConfig(max_num_queued_reqs=1)
        async with application(tiny_model_dir, http=http, stall_after=1) as app, trio.open_nursery() as nursery:
            for number in range(1, 5):
                nursery.start_soon(app.chat)
                await app.engine.wait_until(lambda number=number: len(app.engine.open) == number)
                await until(lambda: app.server.engine.backlog.num_sequences == 0)
            await go_on(app)

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_makes_room(tiny_model_dir: Path, stream: bool) -> None:
    async def main() -> None:
        http = HttpConfig(max_num_queued_reqs=1)
        async with application(tiny_model_dir, http=http, stall_after=0) as app, trio.open_nursery() as nursery:
            gone = trio.Event()
            nursery.start_soon(partial(post, app, CHAT_PATH, {**CHAT, "stream": stream}, gone=gone))
            await app.engine.wait_until(lambda: len(app.engine.open) == 1)
            assert (await app.post(CHAT_PATH, CHAT))[0] == 429
            gone.set()
            await app.engine.wait_until(lambda: len(app.engine.cancelled) == 1)
            app.engine.stall_after = None
            await app.chat()

    run(main)


def test_what_was_admitted_is_not_refused_by_a_restart(tiny_model_dir: Path) -> None:
    async def main() -> None:
        http = HttpConfig(max_num_queued_reqs=2)
        async with application(tiny_model_dir, http=http, die_when_asked=True) as app, trio.open_nursery() as nursery:
            nursery.start_soon(partial(app.chat, n=2))
            await until(lambda: app.engine.num_connections == 2)
            assert app.server.engine.backlog.num_sequences == 2
            app.engine.die_when_asked = False

    run(main)


def test_a_stream_that_never_begins_leaves_nothing_behind(tiny_model_dir: Path) -> None:
    """Its route has returned; what fails after that is not the route's to clean up."""

    async def main() -> None:
        async def fail(response: Response) -> Response:
            raise KeyError("after the route")

        async with application(tiny_model_dir, stall_after=0) as app:
            app.app.after_request(fail)
            assert (await post(app, CHAT_PATH, {**CHAT, "n": 2, "stream": True})).status == 500
            assert app.server.engine.num_open == 0
            assert app.server.engine.backlog.num_sequences == 0

    run(main)


def test_the_time_to_come_back_is_that_of_half_of_what_waits() -> None:
    backlog = Backlog()
    for _ in range(120):
        backlog.enter(10, client="")
    assert (backlog.num_sequences, backlog.num_tokens) == (120, 1200)
    assert backlog.seconds_to_begin(60, now=0.0) is None
    for second in range(20):
        backlog.begin(10, client="", now=float(second))
    # 20 in 20 seconds: one a second
    assert backlog.seconds_to_begin(50, now=20.0) == pytest.approx(50.0)
    error = overloaded(backlog, "queued_reqs", limit=100, now=20.0)
    assert error.retry_after == pytest.approx(50.0)
    assert "100 sequences with 1000 prompt tokens wait" in str(error)
    assert "half of them begin within 50 s" in str(error)
    for _ in range(900):
        backlog.enter(10, client="")
    assert overloaded(backlog, "queued_reqs", limit=100, now=20.0).retry_after == MAX_RETRY_AFTER
    # long ago says nothing of now
    assert backlog.seconds_to_begin(50, now=100.0) is None
    assert "not known" in str(overloaded(backlog, "queued_tokens", limit=100, now=100.0))


def test_a_request_may_fill_the_queue_to_the_last_place() -> None:
    backlog = Backlog()
    backlog.enter(10, client="")
    ask = partial(rejection, backlog, max_num_sequences=3, max_num_tokens=30)
    assert ask(num_sequences=2, num_tokens=20) is None
    assert ask(num_sequences=3, num_tokens=20) == "queued_reqs"
    assert ask(num_sequences=2, num_tokens=21) == "queued_tokens"
    backlog.leave(10, client="")
    assert ask(num_sequences=9, num_tokens=90) is None


def test_a_key_that_fills_the_queue_leaves_room_for_another(tiny_model_dir: Path) -> None:
    async def main() -> None:
        http = HttpConfig(max_num_queued_reqs=8, api_key_digests=(key_digest("sk-1"), key_digest("sk-2")))
        async with application(tiny_model_dir, http=http, stall_after=0) as app, trio.open_nursery() as nursery:
            greedy, other = ({"Authorization": f"Bearer sk-{number}"} for number in (1, 2))
            for number in range(1, 5):
                nursery.start_soon(partial(post, app, CHAT_PATH, CHAT, headers=greedy))
                await app.engine.wait_until(lambda number=number: len(app.engine.open) == number)
            refused = await post(app, CHAT_PATH, CHAT, headers=greedy)
            assert refused.status == 429
            assert "4 sequences with" in as_openai_sees(refused).message
            nursery.start_soon(partial(post, app, COMPLETIONS_PATH, {"prompt": "x", "n": 2}, headers=other))
            await app.engine.wait_until(lambda: len(app.engine.open) == 6)
            assert (await post(app, CHAT_PATH, {**CHAT, "n": 2}, headers=other)).status == 429
            await go_on(app)

    run(main)


def test_without_keys_a_token_is_no_client_of_its_own(tiny_model_dir: Path) -> None:
    async def main() -> None:
        http = HttpConfig(max_num_queued_reqs=8)
        async with application(tiny_model_dir, http=http, stall_after=0) as app, trio.open_nursery() as nursery:
            headers = {"Authorization": "Bearer anything"}
            nursery.start_soon(partial(post, app, CHAT_PATH, {**CHAT, "n": 7}, headers=headers))
            await app.engine.wait_until(lambda: len(app.engine.open) == 7)
            nursery.start_soon(partial(post, app, CHAT_PATH, CHAT, headers=headers))
            await app.engine.wait_until(lambda: len(app.engine.open) == 8)
            await go_on(app)

    run(main)


# --- deadlines


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "header"), [(2.5, None), (None, "2.5"), (2.5, "60"), (60, "2.5")], ids=["field", "header", "both", "both"]
)
def test_a_deadline_before_the_first_token_is_a_408(
    tiny_model_dir: Path, path: str, field: float | None, header: str | None
) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, stall_after=0) as app:
            headers = {} if header is None else {"X-Request-Timeout": header}
            begun = trio.current_time()
            answered = await post(app, path, body_for(path, n=2, timeout=field), headers=headers)
            assert trio.current_time() - begun == pytest.approx(2.5)
            error = as_openai_sees(answered)
            assert (answered.status, error.type, error.code) == (408, "invalid_request_error", "deadline_exceeded")
            assert "timeout of 2.5 seconds" in error.message
            assert answered.headers[b"x-should-retry"] == b"false"
            await app.engine.wait_until(lambda: len(app.engine.cancelled) == 2)

    run(main)


@pytest.mark.parametrize("path", PATHS)
def test_a_deadline_before_the_first_token_of_a_stream_is_an_error_event(tiny_model_dir: Path, path: str) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, stall_after=0) as app:
            events = await app.stream(path, body_for(path, timeout=1.5))
            assert [event["error"]["code"] for event in events] == ["deadline_exceeded"]
            await app.engine.wait_until(lambda: len(app.engine.cancelled) == 1)

    run(main)


@pytest.mark.parametrize("path", PATHS)
def test_a_deadline_in_the_middle_ends_with_what_there_is(tiny_model_dir: Path, path: str) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, stall_after=5, script=say("Hello, world")) as app:
            body = body_for(path, n=2, timeout=3, stop="o,")
            begun = trio.current_time()
            status, whole = await app.post(path, body)
            assert trio.current_time() - begun == pytest.approx(3.0)
            assert status == 200
            texts = [choice.get("text") or choice["message"]["content"] for choice in whole["choices"]]
            # the "o" was held back: it might have begun the stop string
            assert texts == ["Hello", "Hello"]
            assert [(choice["finish_reason"], choice["stop_reason"]) for choice in whole["choices"]] == [
                ("length", None)
            ] * 2
            assert whole["usage"]["completion_tokens"] == 10
            await app.engine.wait_until(lambda: len(app.engine.cancelled) == 2)

            *events, last = await app.stream(path, {**body, "stream_options": {"include_usage": True}})
            for index in (0, 1):
                choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
                assert "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices) == "Hello"
                assert choices[-1]["finish_reason"] == "length"
            assert last["usage"] == whole["usage"]
            await app.engine.wait_until(lambda: len(app.engine.cancelled) == 4)

    run(main)


@pytest.mark.parametrize("path", PATHS)
def test_a_resumed_request_keeps_its_deadline(tiny_model_dir: Path, path: str) -> None:
    """Its time runs from its arrival, however many engines it sees."""

    async def main() -> None:
        async with (
            application(tiny_model_dir, stall_after=2, die_after=[2], script=say("Hello, world")) as app,
            trio.open_nursery() as nursery,
        ):
            begun = trio.current_time()
            answers: list[Any] = []

            async def ask() -> None:
                answers.append(await app.post(path, body_for(path, timeout=3)))
                assert trio.current_time() - begun == pytest.approx(3.0)

            nursery.start_soon(ask)
            await app.engine.wait_until(lambda: len(app.engine.received) == 2)
            await trio.sleep(2.0)
            await go_on(app, stall_after=4)
            await until(lambda: bool(answers))
            status, whole = answers[0]
            choice = whole["choices"][0]
            assert (status, choice["finish_reason"]) == (200, "length")
            assert (choice.get("text") or choice["message"]["content"]) == "Hell"

    run(main)


def test_a_choice_without_a_token_ends_empty_where_another_has_some(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, stall_after=0) as app, trio.open_nursery() as nursery:
            answers: list[Any] = []

            async def ask() -> None:
                answers.append(await app.complete(["ab", "cd"], timeout=3, max_tokens=4, logprobs=0))

            nursery.start_soon(ask)
            await app.engine.wait_until(lambda: len(app.engine.open) == 2)
            # as if the second prompt had no turn yet
            second = max(app.engine.open)
            del app.engine.open[second]
            await go_on(app)
            await until(lambda: bool(answers))
            first, empty = answers[0]["choices"]
            assert (first["text"], first["finish_reason"]) == ("Hell", "length")
            assert (empty["text"], empty["finish_reason"], empty["logprobs"]["tokens"]) == ("", "length", [])
            assert answers[0]["usage"]["completion_tokens"] == 4

    run(main)


def test_nothing_is_computed_after_the_deadline_for_a_client_that_does_not_read(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, stall_after=3) as app, trio.open_nursery() as nursery:
            reads = trio.Event()
            answers: list[Answered] = []

            async def ask() -> None:
                answers.append(await post(app, CHAT_PATH, {**CHAT, "stream": True, "timeout": 2}, reads=reads))

            nursery.start_soon(ask)
            await app.engine.wait_until(lambda: len(app.engine.open) == 1)
            await trio.sleep(3)
            assert app.engine.cancelled == []
            await go_on(app, stall_after=4)
            await app.engine.wait_until(lambda: len(app.engine.cancelled) == 1)
            reads.set()
            await until(lambda: bool(answers))
            events = parse_events(bytes(answers[0].body))
            assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "Hell"
            assert events[-1]["choices"][0]["finish_reason"] == "length"

    run(main)


def test_a_deadline_that_does_not_pass_changes_nothing(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            plain = await app.chat(seed=1)
            hurried = await app.chat(seed=1, timeout=1e6)
            assert hurried["choices"] == plain["choices"]

    run(main)


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", ""])
def test_a_header_that_is_no_time_is_refused(tiny_model_dir: Path, value: str) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            answered = await post(app, CHAT_PATH, CHAT, headers={"X-Request-Timeout": value})
            assert answered.status == 400
            assert "X-Request-Timeout must be a number of seconds" in json.loads(answered.body)["error"]["message"]
            assert app.engine.received == []

    run(main)


# --- who asks


def test_the_engine_is_told_who_asks_but_not_the_key(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            for headers in (
                {"Authorization": "Bearer secret-1"},
                {"authorization": "bearer secret-1"},
                {"Authorization": "Bearer secret-2"},
                {},
                {"Authorization": "Basic eDp5"},
            ):
                assert (await post(app, CHAT_PATH, CHAT, headers=headers)).status == 200
            same, again, other, nobody, basic = (request.client for request in app.engine.received)
            assert same == again != other
            assert nobody == basic == ""
            assert not any("secret" in client for client in (same, other))

    run(main)
