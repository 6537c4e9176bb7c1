"""The server's side of the engine socket: many generations over one stream that may be lost and come back.

It owns the state of every open sequence (contract C1), so a new engine goes on where the last one stopped. It must
not know HTTP, text or metrics.
"""

import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Self

import msgspec
import trio

from llmd.protocol.figures import EngineHistory
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.generation import (
    CancelRequest,
    EngineReady,
    EngineToServer,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    ServerToEngine,
    StepEvents,
    TokenEvent,
)
from llmd.server.admission import Backlog
from llmd.server.engine_history import heard
from llmd.server.mailbox import Mailbox
from llmd.server.suspicion import Suspicion

Connect = Callable[[str], Awaitable[trio.abc.Stream]]

FIRST_RETRY = 0.05  # seconds
LAST_RETRY = 1.0
# bytes that are encoded before others get their turn: 128 choices of a long prompt make 70 MB
MAX_WRITE = 1 << 16


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """One sequence as it begins: what the engine must know of it."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    client: str = ""
    deadline: float = math.inf  # on trio's clock; nothing is computed after it, whoever takes the events or does not


IndexedEvent = tuple[int, TokenEvent]  # (which sequence of the generation, what it says)


@dataclass(slots=True, eq=False)
class _OpenSequence:
    """A sequence that has not ended, with everything that is needed to submit it again."""

    index: int
    start: SequenceStart
    events: Mailbox[IndexedEvent]
    arrived: float  # on trio's clock, as all times here
    request_id: int = -1  # of the latest submission
    output_token_ids: list[int] = field(default_factory=list)
    waits: bool = True  # it counts in the backlog
    heard: bool = False  # its first event came, and with it what is told once only
    started_at: float | None = None  # when an engine first began to run it
    suspicion: Suspicion = field(default_factory=Suspicion)

    def request(self) -> GenerateRequest:
        sampling = self.start.sampling
        if self.heard and sampling.num_prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, num_prompt_logprobs=None)
        return GenerateRequest(
            request_id=self.request_id,
            prompt_token_ids=self.start.prompt_token_ids,
            sampling=sampling,
            output_token_ids=self.output_token_ids,
            priority=self.start.priority,
            cache_salt=self.start.cache_salt,
            client=self.start.client,
            alone=self.suspicion.must_be_alone,
        )

    def take_in(self, event: TokenEvent) -> None:
        if self.heard and (event.prompt_logprobs is not None or event.num_cached_tokens is not None):
            event = msgspec.structs.replace(event, prompt_logprobs=None, num_cached_tokens=None)
        self.heard = True
        if event.token_ids:
            self.suspicion.note_token()
        self.output_token_ids += event.token_ids
        self.events.put((self.index, event))

    def fail(self, message: str) -> None:
        self.take_in(TokenEvent(request_id=self.request_id, finish=FinishReason.ERROR, error=message))


class Generation:
    """The sequences of one client's request. Leaving the block (`with`) cancels those that have not ended."""

    def __init__(self, engine: "EngineClient", events: Mailbox[IndexedEvent], sequences: list[_OpenSequence]) -> None:
        self._engine = engine
        self._events = events
        self._sequences = sequences

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # a cancelled task may not await here, so this only queues the messages
        self.cancel_all()

    async def take(self) -> list[IndexedEvent]:
        """All events that are pending, in order of arrival; waits for the first. One event a sequence has `finish`."""
        return await self._events.take()

    def take_pending(self) -> list[IndexedEvent]:
        """The events that are there already."""
        return self._events.take_pending()

    def started_at(self, index: int) -> float | None:
        """When an engine first began to run this sequence, on trio's clock; None while it has not."""
        return self._sequences[index].started_at

    def cancel(self, index: int) -> None:
        """Stop one sequence early. Events of it that are pending already still come."""
        self._engine._close(self._sequences[index])

    def cancel_all(self) -> None:
        for sequence in self._sequences:
            self._engine._close(sequence)


class EngineClient:
    """`run()` keeps the connection; `generate()` works whether there is one or not, and waits through a restart.

    `path` is the engine's unix socket. `connect` opens it; tests give their own.
    """

    def __init__(self, path: str, *, connect: Connect = trio.open_unix_socket) -> None:
        self._path = path
        self._connect = connect
        # never used twice, so what a dead engine still says is nobody's
        self._request_ids = count()
        self._open: dict[int, _OpenSequence] = {}
        self._outbox: Mailbox[ServerToEngine] = Mailbox()
        self._became_ready = trio.Event()
        self._had_progress = False  # the engine of now has given somebody a token, or an end that needs none
        self.num_resumed = 0  # sequences handed to one more engine
        self.ready: EngineReady | None = None
        self.history = EngineHistory()  # what the engines have counted
        self.backlog = Backlog()

    @property
    def num_open(self) -> int:
        """Sequences that have not ended."""
        return len(self._open)

    def waiting_since(self) -> float | None:
        """When the oldest sequence came that has no token yet, on trio's clock; None if there is none."""
        return min((sequence.arrived for sequence in self._open.values() if sequence.waits), default=None)

    async def wait_ready(self) -> EngineReady:
        while self.ready is None:
            await self._became_ready.wait()
        return self.ready

    def generate(self, starts: Sequence[SequenceStart]) -> Generation:
        """Run these sequences, from now on. Use it as a block: leaving it cancels what has not ended."""
        events: Mailbox[IndexedEvent] = Mailbox()
        now = trio.current_time()
        sequences = [_OpenSequence(index, start, events, arrived=now) for index, start in enumerate(starts)]
        for sequence in sequences:
            self.backlog.enter(len(sequence.start.prompt_token_ids), client=sequence.start.client)
            self._submit(sequence)
        return Generation(self, events, sequences)

    def fail_all(self, message: str) -> None:
        """End every open sequence with an error: the engine will not come back."""
        for sequence in list(self._open.values()):
            self._fail(sequence, message)

    async def run(self) -> None:
        """Connect, converse, connect again; until cancelled."""
        delay = FIRST_RETRY
        while True:
            try:
                stream = await self._connect(self._path)
            except OSError:
                pass  # nobody listens (yet, or any more): the supervisor tells the operator why
            else:
                if await self._converse(stream):
                    delay = FIRST_RETRY
            await trio.sleep(delay)
            delay = min(2 * delay, LAST_RETRY)

    async def _converse(self, stream: trio.abc.Stream) -> bool:
        """One connection until it is lost. True if the engine became ready on it."""
        # what was queued for the last engine means nothing to this one
        self._outbox = Mailbox()
        self._had_progress = False
        try:
            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._write, stream, self._outbox)
                await self._read(stream)
                nursery.cancel_scope.cancel()
        finally:
            was_ready, self.ready = self.ready is not None, None
            if was_ready:
                self._became_ready = trio.Event()
        if was_ready:
            self._note_death()
        return was_ready

    async def _write(self, stream: trio.abc.SendStream, outbox: Mailbox[ServerToEngine]) -> None:
        try:
            while True:
                for data in _encoded(await outbox.take()):
                    await stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # the reader sees it too, and ends the conversation

    async def _read(self, stream: trio.abc.ReceiveStream) -> None:
        decoder: FrameDecoder[EngineToServer] = FrameDecoder(EngineToServer)
        try:
            async for data in stream:
                for message in decoder.feed(data):
                    self._take_in(message)
        except (trio.BrokenResourceError, trio.ClosedResourceError, msgspec.DecodeError):
            return  # a dead engine, or one that speaks another language: `run` looks for the next

    def _take_in(self, message: EngineToServer) -> None:
        match message:
            case EngineReady():
                self.ready = message
                self._became_ready.set()
                self._submit_open()
            case StepEvents():
                if message.statistics is not None:
                    self.history = heard(self.history, message.statistics)
                for request_id in message.started:
                    self._note_started(request_id)
                for event in message.all_events():
                    self._deliver(event)

    def _submit_open(self) -> None:
        """Give a new engine all that the last ones left, the most suspect first: see `suspicion`."""
        sequences = sorted(self._open.values(), key=lambda sequence: -sequence.suspicion.num_deaths)
        self._open.clear()
        for sequence in sequences:
            self._submit(sequence)

    def _submit(self, sequence: _OpenSequence) -> None:
        """Under a new id, now or as soon as there is an engine."""
        sequence.request_id = next(self._request_ids)
        self._open[sequence.request_id] = sequence
        if self.ready is not None:
            self.num_resumed += sequence.suspicion.num_engines > 0
            sequence.suspicion.note_submitted()
            self._outbox.put(sequence.request())

    def _note_started(self, request_id: int) -> None:
        if sequence := self._open.get(request_id):
            sequence.suspicion.note_started()
            if sequence.started_at is None:
                sequence.started_at = trio.current_time()

    def _note_death(self) -> None:
        """The engine is lost: who ran there is suspect, and who is surely guilty ends."""
        for sequence in list(self._open.values()):
            sequence.suspicion.note_death(had_progress=self._had_progress)
            if verdict := sequence.suspicion.verdict():
                self._fail(sequence, verdict)

    def _deliver(self, event: TokenEvent) -> None:
        self._had_progress |= event.finish is not FinishReason.ERROR
        sequence = self._open.get(event.request_id)
        if sequence is None:
            return  # cancelled while the event was on its way
        if sequence.waits:
            sequence.waits = False
            self.backlog.begin(
                len(sequence.start.prompt_token_ids), client=sequence.start.client, now=trio.current_time()
            )
        sequence.take_in(event)
        if event.finish is not None:
            del self._open[event.request_id]
        elif sequence.start.deadline <= trio.current_time():
            # whoever takes the events may be held up by a client that does not read
            self._close(sequence)

    def _leave_backlog(self, sequence: _OpenSequence) -> None:
        if sequence.waits:
            sequence.waits = False
            self.backlog.leave(len(sequence.start.prompt_token_ids), client=sequence.start.client)

    def _fail(self, sequence: _OpenSequence, message: str) -> None:
        self._close(sequence)
        sequence.fail(message)

    def _close(self, sequence: _OpenSequence) -> None:
        self._leave_backlog(sequence)
        if self._open.pop(sequence.request_id, None) is not None and self.ready is not None:
            self._outbox.put(CancelRequest(sequence.request_id))


def _encoded(messages: Iterable[ServerToEngine]) -> Iterator[bytes]:
    """Frames, small ones together, each as late as it is wanted."""
    data = bytearray()
    for message in messages:
        data += encode_frame(message)
        if len(data) >= MAX_WRITE:
            yield bytes(data)
            data.clear()
    if data:
        yield bytes(data)
