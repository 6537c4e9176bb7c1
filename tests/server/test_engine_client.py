"""The engine may die, be late, or fail one request; a client may leave: nothing is lost, doubled or left behind."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from llmd.protocol.control import Stage, SystemState
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.generation import (
    EngineReady,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    ServerToEngine,
    TokenEvent,
)
from llmd.server.engine_client import MAX_WRITE, EngineClient, SequenceStart
from llmd.server.mailbox import Mailbox
from llmd.text.tokenizer import Tokenizer
from tests.server.fake_engine import SOON, Answered, Application, application, parse_events, run
from tests.server.live import http_request, live_server

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("die_after", [[1], [5], [5, 0], [3, 4, 1], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_engine_that_dies_is_only_a_pause(tiny_model_dir: Path, path: str, die_after: list[int]) -> None:
    fields = {"n": 2, "seed": 7, "logprobs": True, "top_logprobs": 1} if "chat" in path else {"n": 2, "logprobs": 1}
    body = {**fields, "stream_options": {"include_usage": True}}
    body |= CHAT if "chat" in path else {"prompt": "Once", "echo": True, "max_tokens": 30}

    async def main() -> None:
        async def events_of(die_after: list[int]) -> tuple[list[dict[str, Any]], int]:
            async with application(tiny_model_dir, die_after=die_after) as app:
                events = await app.stream(path, body)
                for event in events:
                    for name in ("id", "created"):
                        event.pop(name)
                return events, app.engine.num_connections

        undisturbed, _ = await events_of([])
        disturbed, num_connections = await events_of([*die_after])
        assert num_connections == len(die_after) + 1
        by_choice = [
            [[event for event in events if not event["choices"] or event["choices"][0]["index"] == i] for i in (0, 1)]
            for events in (undisturbed, disturbed)
        ]
        assert by_choice[0] == by_choice[1]

    run(main)


def test_a_resumed_request_carries_what_was_received(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, die_after=[4]) as app:
            answer = await app.complete("ab", echo=True, logprobs=0, max_tokens=10, seed=3, return_token_ids=True)
            first, second = app.engine.received
            assert first.output_token_ids == []
            assert second.output_token_ids == answer["choices"][0]["token_ids"][:4]
            assert second.request_id != first.request_id
            # prompt log-probabilities had come already
            assert (first.sampling.num_prompt_logprobs, second.sampling.num_prompt_logprobs) == (0, None)
            assert second.sampling.seed == first.sampling.seed == 3

    run(main)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "stream": True, "n": 3}),
        ("/v1/chat/completions", {**CHAT, "n": 3}),
        ("/v1/completions", {"prompt": ["a", "b", "c"], "stream": True}),
    ],
)
def test_a_client_that_leaves_cancels_all_its_sequences(tiny_model_dir: Path, path: str, body: object) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, stall_after=4) as app, trio.open_nursery() as nursery:
            gone = trio.Event()

            async def ask() -> None:
                data = json.dumps(body).encode()
                await app.request("POST", path, data, content_type="application/json", gone=gone)

            nursery.start_soon(ask)
            await app.engine.wait_until(lambda: len(app.engine.open) == 3)
            gone.set()
            await app.engine.wait_until(lambda: len(app.engine.cancelled) == 3)
            assert app.server.engine.num_open == 0

    run(main)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_a_real_connection_cancels_its_sequences(tiny_model_dir: Path, stream: bool) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, stall_after=4) as app, live_server(app.app) as live:
            client = await live.connect()
            await client.send_all(http_request("/v1/chat/completions", {**CHAT, "n": 2, "stream": stream}))
            await app.engine.wait_until(lambda: len(app.engine.open) == 2)
            await client.aclose()
            await app.engine.wait_until(lambda: len(app.engine.cancelled) == 2)
            assert app.server.engine.num_open == 0
            assert await num_finished(app) == {"abort": 2.0}

    run(main, uses_threads=True)


@pytest.mark.parametrize("fields", [{}, {"stop": "answer"}])
def test_a_client_that_does_not_read_holds_up_nobody(tiny_model_dir: Path, fields: dict[str, Any]) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app, trio.open_nursery() as nursery:
            reads = trio.Event()
            slow: list[Answered] = []

            async def ask_slowly() -> None:
                data = json.dumps({**CHAT, **fields, "stream": True}).encode()
                slow.append(
                    await app.request(
                        "POST", "/v1/chat/completions", data, content_type="application/json", reads=reads
                    )
                )

            nursery.start_soon(ask_slowly)
            await app.engine.wait_until(lambda: bool(app.engine.received) and not app.engine.open)
            # the engine is done with it, and others are served meanwhile
            whole = await app.chat(**fields)
            assert not slow
            reads.set()
            while not slow:
                await trio.lowlevel.checkpoint()
            events = parse_events(bytes(slow[0].body))
            text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
            assert text == whole["choices"][0]["message"]["content"]
            # what was pending went out together
            assert slow[0].num_writes < 10

    run(main)


async def num_finished(app: Application) -> dict[str, float]:
    """Finished sequences by reason, as Prometheus reads them."""
    text = (await app.request("GET", "/metrics")).body.decode()
    lines = re.findall(r'^vllm:request_success_total\{.*finished_reason="(\w+)".*\} (\S+)$', text, re.M)
    return {reason: float(count) for reason, count in lines if float(count)}


def test_every_sequence_is_counted_once(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            await app.chat(n=2)
            await app.chat(max_tokens=2)
            await app.stream_chat(stop="wör")
            assert await num_finished(app) == {"stop": 3.0, "length": 1.0}

    run(main)


def test_a_stop_string_cancels_its_sequence_in_the_engine(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            answer = await app.chat(stop=" answer")
            assert answer["choices"][0]["message"]["content"] == "Hello, wörld 👋! The"
            await app.engine.wait_until(lambda: len(app.engine.cancelled) == 1)

    run(main)


def test_a_choice_that_stops_is_cancelled_while_others_go_on(tiny_model_dir: Path) -> None:
    def script(request: GenerateRequest, tokenizer: Tokenizer) -> list[int]:
        return tokenizer.encode("a.b.c.d" if request.sampling.choice else "ab;cdef", add_special_tokens=False)

    async def main() -> None:
        async with application(tiny_model_dir, script=script, stall_after=5) as app, trio.open_nursery() as nursery:
            nursery.start_soon(partial(app.chat, n=2, stop=";"))
            await app.engine.wait_until(lambda: len(app.engine.cancelled) == 1)
            assert [request.sampling.choice for request in app.engine.open.values()] == [1]
            nursery.cancel_scope.cancel()

    run(main)


def test_tokens_behind_a_stop_string_do_not_count(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, tokens_per_event=100) as app:
            answer = await app.complete("ab", stop="lo", max_tokens=50, logprobs=0, return_token_ids=True, n=2)
            assert answer["usage"]["completion_tokens"] == 2 * len("Hello")
            # of two choices of one prompt only the first tells what the cache held before
            assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
            for choice in answer["choices"]:
                assert len(choice["token_ids"]) == len(choice["logprobs"]["tokens"]) == len("Hello")

    run(main)


def test_what_was_meant_for_a_dead_engine_is_not_told_to_the_next() -> None:
    async def main() -> None:
        ends: list[trio.StapledStream[Any, Any]] = []

        async def connect(path: str) -> trio.abc.Stream:
            ours, theirs = trio.testing.memory_stream_pair()
            ends.append(ours)
            if len(ends) > 1:
                await ours.send_all(
                    encode_frame(EngineReady(max_model_len=9, block_size=1, num_blocks=9, vocab_size=264))
                )
            else:
                # an engine that ends before it is ready; whoever waits goes on waiting
                ours.send_stream.close()
            return theirs

        client = EngineClient("engine.sock", connect=connect)
        start = SequenceStart(prompt_token_ids=[1], sampling=SamplingParams(max_tokens=1, seed=0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            await client.wait_ready()
            # the engine reads no more, and the client cannot know yet that it will not answer either
            ends[1].receive_stream.close()
            for _ in range(2):
                with client.generate([start]):
                    await trio.testing.wait_all_tasks_blocked()
            ends[1].send_stream.close()
            await trio.testing.wait_all_tasks_blocked()
            await client.wait_ready()
            assert len(ends) == 3
            with trio.move_on_after(1) as waiting:
                await ends[2].receive_some()
            assert waiting.cancelled_caught
            nursery.cancel_scope.cancel()

    run(main)


def test_an_engines_error_ends_the_request_with_an_error(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, error_after=2) as app:
            status, answer = await app.post("/v1/chat/completions", CHAT)
            expected = {"message": "the fake engine failed", "type": "server_error", "param": None, "code": None}
            assert (status, answer) == (500, {"error": expected})
            events = await app.stream_chat(n=2)
            assert events[-1] == {"error": expected}
            assert [event for event in events if "error" in event] == events[-1:]
            assert any(event["choices"][0]["delta"].get("content") for event in events[:-1])

    run(main)


def test_before_the_engine_is_ready_requests_get_503(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, wait_ready=False) as app:
            app.engine.is_up = False
            app.server.engine.ready = None
            text, app.server.text = app.server.text, None
            app.server.state.update(SystemState(stage=Stage.LOADING, detail="loading weights"))
            status, answer = await app.post("/v1/chat/completions", CHAT)
            assert status == 503
            assert "loading" in answer["error"]["message"]
            app.server.text = text
            app.server.state.update(SystemState(stage=Stage.DRAINING))
            status, answer = await app.post("/v1/completions", {"prompt": "a"})
            assert (status, answer["error"]["type"]) == (503, "server_error")

    run(main)


def test_an_engine_that_will_not_come_back_ends_what_waits(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, stall_after=3) as app, trio.open_nursery() as nursery:
            answers = []

            async def ask() -> None:
                data = json.dumps({**CHAT, "stream": True}).encode()
                answers.append(await app.request("POST", "/v1/chat/completions", data, content_type="application/json"))

            nursery.start_soon(ask)
            await app.engine.wait_until(lambda: len(app.engine.open) == 1)
            app.server.engine.fail_all("gone for good")
            with trio.fail_after(SOON):
                while not answers:
                    await trio.lowlevel.checkpoint()
            assert parse_events(bytes(answers[0].body))[-1]["error"]["message"] == "gone for good"

    run(main)


def test_a_request_that_kills_every_engine_is_given_up(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, die_when_asked=True) as app:
            status, answer = await app.post("/v1/chat/completions", CHAT)
            assert (status, answer["error"]["type"]) == (500, "server_error")
            assert "died 3 times" in answer["error"]["message"]
            assert "on this request alone, so it is not tried again" in answer["error"]["message"]
            assert [request.alone for request in app.engine.received] == [False, False, True]
            await app.server.engine.wait_ready()
            events = await app.stream_chat()
            assert events[-1]["error"] == answer["error"]
            assert len(app.engine.received) == 6

    run(main)


def test_generations_wait_for_an_engine_that_is_late() -> None:
    async def main() -> None:
        attempts = 0

        async def connect(path: str) -> trio.abc.Stream:
            nonlocal attempts
            attempts += 1
            raise FileNotFoundError(path)

        client = EngineClient("nowhere", connect=connect)
        start = SequenceStart(prompt_token_ids=[1], sampling=SamplingParams(max_tokens=1, seed=0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            with trio.move_on_after(20) as waiting, client.generate([start]) as generation:
                await generation.take()
            assert waiting.cancelled_caught
            # it tries again and again, but not all the time
            assert 10 < attempts < 40
            assert client.num_open == 0
            nursery.cancel_scope.cancel()

    run(main)


def test_events_wait_for_a_slow_reader_and_stop_after_the_end() -> None:
    async def main() -> None:
        mailbox: Mailbox[int] = Mailbox()
        mailbox.put(1)
        mailbox.put(2)
        assert await mailbox.take() == [1, 2]
        with trio.CancelScope() as scope:
            scope.cancel()
            mailbox.put(3)
            await mailbox.take()
        # the cancelled reader has taken nothing
        assert await mailbox.take() == [3]

    run(main)


def test_ending_is_told_once(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            start = SequenceStart(
                prompt_token_ids=[1], sampling=SamplingParams(max_tokens=3, seed=0, stop_token_ids=(261,))
            )
            with app.server.engine.generate([start]) as generation:
                events: list[TokenEvent] = []
                while not events or events[-1].finish is None:
                    events += [event for _, event in await generation.take()]
                app.server.engine.fail_all("too late")
                with trio.move_on_after(0):
                    events += [event for _, event in await generation.take()]
            assert [event.finish for event in events] == [None, None, FinishReason.LENGTH]

    run(main)


def test_many_choices_of_a_long_prompt_leave_others_their_turn() -> None:
    """Encoded in one go, those of the longest contexts held up the event loop for 0.2 s, and took 140 MB."""

    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        writes: list[int] = []

        async def connect(path: str) -> trio.abc.Stream:
            return ours

        client = EngineClient("engine.sock", connect=connect)
        send_all = ours.send_all

        async def noting(data: Any) -> None:
            writes.append(len(data))
            await send_all(data)

        ours.send_all = noting  # type: ignore[method-assign]
        start = SequenceStart(prompt_token_ids=[100_000] * 8000, sampling=SamplingParams(max_tokens=1, seed=1))
        ready = EngineReady(max_model_len=8192, block_size=16, num_blocks=9, vocab_size=200_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            await theirs.send_all(encode_frame(ready))
            await client.wait_ready()
            decoder: FrameDecoder[Any] = FrameDecoder(ServerToEngine)
            received = []
            with client.generate([start] * 128):
                while len(received) < 128:
                    received += decoder.feed(await theirs.receive_some())
            while len(received) < 256:
                received += decoder.feed(await theirs.receive_some())
            nursery.cancel_scope.cancel()
        assert [request.request_id for request in received] == [*range(128), *range(128)]
        assert all(request.prompt_token_ids == start.prompt_token_ids for request in received[:128])
        # a frame beyond the limit at most; and what is small goes together
        assert max(writes) < MAX_WRITE + 50_000
        assert len(writes) < 100

    run(main)
