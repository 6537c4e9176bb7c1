"""A scripted engine that speaks the protocol, and a whole application around it, in one process and without sockets."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
import trio.testing

from llmd.config import HttpConfig, LogConfig, ModelConfig, ServerConfig
from llmd.protocol.control import Stage, SystemState
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.generation import (
    CancelRequest,
    EngineReady,
    FinishReason,
    GenerateRequest,
    ServerToEngine,
    StepEvents,
    TokenEvent,
    TokenLogprobs,
)
from llmd.server.app import create_app
from llmd.server.context import Server, StateBoard, TextModel
from llmd.server.engine_client import EngineClient
from llmd.server.metrics import Metrics
from llmd.text.chat_template import ChatTemplate
from llmd.text.tokenizer import Tokenizer

SOON = 10.0
MAX_MODEL_LEN = 512
ANSWER = "Hello, wörld 👋! The answer is 42."

Script = Callable[[GenerateRequest, Tokenizer], list[int]]


def say(text: str) -> Script:
    """Every sequence answers this, and the end of sequence."""
    return lambda request, tokenizer: [*tokenizer.encode(text, add_special_tokens=False), end_token(tokenizer)]


def say_choice(request: GenerateRequest, tokenizer: Tokenizer) -> list[int]:
    """Every choice says which one it is."""
    text = f"{ANSWER} ({request.sampling.choice})"
    return [*tokenizer.encode(text, add_special_tokens=False), end_token(tokenizer)]


def end_token(tokenizer: Tokenizer) -> int:
    return min(tokenizer.eos_token_ids)


@dataclass
class FakeEngine:
    """Answers every request with its script: `tokens_per_event` new tokens an event, all requests in turn.

    `stall_after`: give only so many tokens in all to each request, then nothing more. `die_after`: close the
    connection after so many events, once for each item. `die_when_asked`: close it at the first request.
    `error_after`: an error event instead of that token.
    """

    tokenizer: Tokenizer
    script: Script = say_choice
    tokens_per_event: int = 1
    stall_after: int | None = None
    error_after: int | None = None
    die_when_asked: bool = False
    die_after: list[int] = field(default_factory=list)
    max_model_len: int = MAX_MODEL_LEN
    num_cached_tokens: int = 3
    received: list[GenerateRequest] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    open: dict[int, GenerateRequest] = field(default_factory=dict)
    is_up: bool = True
    num_connections: int = 0

    def __post_init__(self) -> None:
        self._incoming, self._accepted = trio.open_memory_channel[trio.abc.Stream](64)
        self.changed = trio.Condition()

    async def connect(self, path: str) -> trio.abc.Stream:
        if not self.is_up:
            raise ConnectionRefusedError(path)
        ours, theirs = trio.testing.memory_stream_pair()
        await self._incoming.send(ours)
        return theirs

    async def run(self) -> None:
        async for stream in self._accepted:
            self.num_connections += 1
            async with stream, trio.open_nursery() as nursery:
                self.open.clear()
                await stream.send_all(
                    encode_frame(
                        EngineReady(max_model_len=self.max_model_len, block_size=16, num_blocks=64, vocab_size=264)
                    )
                )
                nursery.start_soon(self._answer, stream, nursery.cancel_scope)
                await self._listen(stream)
                nursery.cancel_scope.cancel()

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Until the engine has heard or done something that makes it true."""
        with trio.fail_after(SOON):
            async with self.changed:
                while not holds():
                    await self.changed.wait()

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _listen(self, stream: trio.abc.Stream) -> None:
        decoder: FrameDecoder[ServerToEngine] = FrameDecoder(ServerToEngine)
        async for data in stream:
            for message in decoder.feed(data):
                match message:
                    case GenerateRequest(request_id=request_id):
                        assert request_id not in self.open
                        self.received.append(message)
                        if self.die_when_asked:
                            await stream.send_all(encode_frame(StepEvents(started=[request_id])))
                            return
                        self.open[request_id] = message
                    case CancelRequest(request_id=request_id):
                        self.cancelled.append(request_id)
                        self.open.pop(request_id, None)
            await self._notify()

    async def _answer(self, stream: trio.abc.Stream, connection: trio.CancelScope) -> None:
        given: dict[int, int] = {}  # tokens, by request id
        told: set[int] = set()  # request ids that have started
        events_until_death = self.die_after.pop(0) if self.die_after else None
        while True:
            async with self.changed:
                while not (events := self._next_events(given)):
                    await self.changed.wait()
            started = [event.request_id for event in events if event.request_id not in told]
            told.update(started)
            await stream.send_all(encode_frame(StepEvents(started=started, events=events)))
            await self._notify()
            if events_until_death is not None:
                events_until_death -= len(events)
                if events_until_death <= 0:
                    connection.cancel()
            await trio.lowlevel.checkpoint()

    def _next_events(self, given: dict[int, int]) -> list[TokenEvent]:
        events = []
        for request in list(self.open.values()):
            event = self._next_event(request, given)
            if event is None:
                continue
            events.append(event)
            if event.finish is not None:
                del self.open[request.request_id]
        return events

    def _next_event(self, request: GenerateRequest, given: dict[int, int]) -> TokenEvent | None:
        is_first = request.request_id not in given
        num_output = len(request.output_token_ids)
        start = given.setdefault(request.request_id, num_output)
        script = self.script(request, self.tokenizer)[: request.sampling.max_tokens]
        if self.error_after is not None and start >= self.error_after:
            return TokenEvent(request_id=request.request_id, finish=FinishReason.ERROR, error="the fake engine failed")
        limit = len(script) if self.stall_after is None else self.stall_after
        token_ids = script[start : min(start + self.tokens_per_event, limit)]
        if not token_ids and script:
            return None
        end = given[request.request_id] = start + len(token_ids)
        finish = None
        if end == len(script):
            stopped = bool(script) and script[-1] in request.sampling.stop_token_ids
            finish = FinishReason.STOP if stopped else FinishReason.LENGTH
        return TokenEvent(
            request_id=request.request_id,
            token_ids=token_ids,
            logprobs=self._logprobs(token_ids, start, request.sampling.num_logprobs),
            prompt_logprobs=self._prompt_logprobs(request) if is_first else None,
            num_cached_tokens=min(self.num_cached_tokens, len(request.prompt_token_ids)) if is_first else None,
            finish=finish,
        )

    def _prompt_logprobs(self, request: GenerateRequest) -> list[TokenLogprobs] | None:
        asked = request.sampling.num_prompt_logprobs
        return None if asked is None else self._logprobs(request.prompt_token_ids[1:], 1, asked)

    def _logprobs(self, token_ids: list[int], start: int, num: int | None) -> list[TokenLogprobs]:
        """Of each token, and of `num` alternatives: the token itself first, then its neighbours in the vocabulary."""
        if num is None:
            return []
        return [
            TokenLogprobs(
                token_id=token_id,
                logprob=-0.5 - position / 64,
                rank=1,
                top_ids=[token_id, *((token_id + i) % 256 for i in range(1, num))][:num],
                top_logprobs=[-0.5 - i - position / 64 for i in range(num)],
            )
            for position, token_id in enumerate(token_ids, start)
        ]


def run(main: Callable[[], Awaitable[None]], *, uses_threads: bool = False) -> None:
    """A test's body, which may not hang. Whenever every task waits, the clock jumps: nobody waits for real.

    The clock does not know of threads, so with them it is the real one.
    """

    async def limited() -> None:
        with trio.fail_after(3 * SOON):
            await main()

    trio.run(limited, clock=None if uses_threads else trio.testing.MockClock(autojump_threshold=0))


@dataclass
class Answered:
    """What an application has answered so far."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    num_writes: int = 0
    reads: trio.Event | None = None  # the client reads nothing of the body before this is set

    async def take_in(self, message: Any) -> None:
        await trio.lowlevel.checkpoint()
        if self.reads is not None and message["type"] == "http.response.body":
            await self.reads.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.lower(): value for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")
            self.num_writes += 1


@dataclass
class Application:
    """The whole application, with what a test wants to look at."""

    server: Server
    engine: FakeEngine
    app: Any

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        content_type: str = "",
        headers: dict[str, str] | None = None,
        gone: trio.Event | None = None,
        reads: trio.Event | None = None,
    ) -> Answered:
        """One request as an ASGI server makes it. `gone`: when it is set, the client has left."""
        given = {"host": "test", **({"content-type": content_type} if content_type else {}), **(headers or {})}
        scope = {
            "type": "http",
            "http_version": "1.1",
            "asgi": {"spec_version": "2.1"},
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
            "extensions": {},
            "state": {},
        }
        answered = Answered(reads=reads)
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop()
            await (trio.Event() if gone is None else gone).wait()
            return {"type": "http.disconnect"}

        with trio.fail_after(SOON):
            await self.app(scope, receive, answered.take_in)
        return answered

    async def post(self, path: str, body: object) -> tuple[int, Any]:
        """Status and decoded JSON."""
        return await self.post_bytes(path, json.dumps(body).encode())

    async def post_bytes(self, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, Any]:
        answered = await self.request("POST", path, body, content_type=content_type)
        return answered.status, json.loads(answered.body)

    async def get(self, path: str) -> tuple[int, Any]:
        answered = await self.request("GET", path)
        return answered.status, json.loads(answered.body)

    async def chat(self, **fields: object) -> Any:
        """A chat that must succeed."""
        body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
        status, answer = await self.post("/v1/chat/completions", body)
        assert status == 200, answer
        return answer

    async def complete(self, prompt: object = "Once", **fields: object) -> Any:
        status, answer = await self.post("/v1/completions", {"prompt": prompt, **fields})
        assert status == 200, answer
        return answer

    async def stream(self, path: str, body: dict[str, object]) -> list[Any]:
        """The decoded events of a stream that must end with [DONE]."""
        data = json.dumps({**body, "stream": True}).encode()
        answered = await self.request("POST", path, data, content_type="application/json")
        assert answered.status == 200, answered.body
        assert answered.headers[b"content-type"] == b"text/event-stream; charset=utf-8"
        return parse_events(bytes(answered.body))

    async def stream_chat(self, **fields: object) -> list[Any]:
        return await self.stream("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], **fields})

    async def stream_completion(self, prompt: object = "Once", **fields: object) -> list[Any]:
        return await self.stream("/v1/completions", {"prompt": prompt, **fields})


def parse_events(data: bytes) -> list[Any]:
    *events, done, nothing = data.split(b"\n\n")
    assert (done, nothing) == (b"data: [DONE]", b"")
    assert all(event.startswith(b"data: ") and b"\n" not in event for event in events)
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


@asynccontextmanager
async def application(
    model_dir: Path,
    *,
    http: HttpConfig | None = None,
    log: LogConfig | None = None,
    sampling_defaults: dict[str, float] | None = None,
    served_names: tuple[str, ...] = ("tiny", "org/tiny"),
    wait_ready: bool = True,
    **engine: Any,
) -> AsyncIterator[Application]:
    """An application whose engine is ready. On leaving, nothing may be open any more in the engine client."""
    tokenizer = Tokenizer.load(model_dir)
    fake = FakeEngine(tokenizer, **engine)
    client = EngineClient("engine.sock", connect=fake.connect)
    config = ServerConfig(
        model=ModelConfig(source=str(model_dir), cache_dir=str(model_dir), served_names=served_names),
        http=http or HttpConfig(),
        listen_fds=(),
        engine_path="engine.sock",
        log=log or LogConfig(),
    )
    server = Server(config=config, state=StateBoard(), engine=client, metrics=Metrics("tiny"))
    server.state.update(SystemState(stage=Stage.READY, model_dir=str(model_dir)))
    server.text = TextModel(
        tokenizer=tokenizer,
        chat_template=ChatTemplate.load(model_dir, special_tokens=tokenizer.named_tokens),
        max_model_len=fake.max_model_len,
        vocab_size=264,
        sampling_defaults=sampling_defaults or {},
    )
    app = create_app(server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fake.run)
        nursery.start_soon(client.run)
        if wait_ready:
            with trio.fail_after(SOON):
                await client.wait_ready()
        yield Application(server, fake, app)
        assert client.num_open == 0
        nursery.cancel_scope.cancel()
