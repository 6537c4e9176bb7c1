"""The step loop: Trio around the pure scheduler. Knows sockets and the clock, and decides nothing about requests.

    servers ──► serve ──► Scheduler.add, cancel
                          Scheduler.plan ──► ranks ──► Scheduler.commit ──► Outbox of each connection ──► servers

One task takes in a result, plans the next step and tells the servers, without a turn of Trio's loop in between: with
few sequences those turns were most of the engine's time.

Nobody waits for a server: what it has not read yet is gathered in its outbox, which is bounded by what its requests
may still produce.
"""

import logging
from itertools import count

import msgspec
import trio

from llmd.engine.direct_io import Sender
from llmd.engine.ranks import RankLost, Ranks
from llmd.engine.scheduler import RequestAlreadyOpen, Scheduler
from llmd.engine.sequence import ConnectionId
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.generation import (
    CancelRequest,
    EngineReady,
    EngineStatistics,
    FinishReason,
    GenerateRequest,
    ServerToEngine,
    StepEvents,
    TokenEvent,
)

STATISTICS_INTERVAL = 0.2  # seconds between two reports while steps run
LAST_WORDS_TIMEOUT = 0.5  # seconds that servers have to take what they have not heard yet, when a rank is lost

_log = logging.getLogger(__name__)


class EngineLoop:
    """Serves any number of connections with one scheduler and one set of ranks."""

    def __init__(self, scheduler: Scheduler, ranks: Ranks, *, ready: EngineReady) -> None:
        self._scheduler = scheduler
        self._ranks = ranks
        self._ready = ready
        self._outboxes: dict[ConnectionId, Outbox] = {}
        self._connection_ids = count()
        self._changed = trio.Event()  # set when there may be something to plan
        self._was_idle = False
        self._next_statistics = -float("inf")  # Trio's clock

    async def run(self) -> None:
        """Run steps until cancelled. Raises RankLost (in an exception group) when a rank is lost."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._ranks.run)
                nursery.start_soon(self._plan_steps)
                nursery.start_soon(self._commit_steps)
        except* RankLost:
            # a server must know who was running, and who had got a token, to suspect the right request
            with trio.move_on_after(LAST_WORDS_TIMEOUT):
                for outbox in list(self._outboxes.values()):
                    outbox.flush()
                    await outbox.wait_all_sent()
            raise

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one server until its connection ends, however it ends; then all its requests are cancelled."""
        connection = ConnectionId(next(self._connection_ids))
        outbox = Outbox(stream, self._ready)
        outbox.put_statistics(self._scheduler.statistics())
        self._outboxes[connection] = outbox
        try:
            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._send, outbox, nursery.cancel_scope)
                await self._receive(stream, connection, outbox)
                nursery.cancel_scope.cancel()
        finally:
            del self._outboxes[connection]
            self._scheduler.disconnect(connection)
            self._changed.set()

    async def _receive(self, stream: trio.abc.Stream, connection: ConnectionId, outbox: "Outbox") -> None:
        """Take in requests until the connection ends or sends what makes no sense."""
        decoder: FrameDecoder[ServerToEngine] = FrameDecoder(ServerToEngine)
        try:
            async for data in stream:
                for message in decoder.feed(data):
                    match message:
                        case GenerateRequest():
                            event = self._add(message, connection)
                            if event is not None:
                                outbox.put_told(StepEvents(events=[event]))
                        case CancelRequest():
                            self._scheduler.cancel(message.request_id, connection=connection)
                outbox.flush()
                self._changed.set()
        except trio.BrokenResourceError:
            return  # gone without a goodbye: the same as an end
        except (msgspec.DecodeError, RequestAlreadyOpen) as error:
            # a server that breaks the protocol loses its connection; the others keep theirs
            _log.error("closed the connection of a server: %s", error)

    def _add(self, request: GenerateRequest, connection: ConnectionId) -> TokenEvent | None:
        """Have the scheduler take in a request; if it chokes on it, that is this request's end and nobody else's."""
        try:
            return self._scheduler.add(request, connection=connection)
        except RequestAlreadyOpen:
            raise
        except Exception as error:
            _log.exception("request %d of connection %d could not be taken in", request.request_id, connection)
            message = f"The engine could not take in this request: {type(error).__name__}. Its log has the details."
            return TokenEvent(request_id=request.request_id, finish=FinishReason.ERROR, error=message)

    async def _send(self, outbox: "Outbox", connection_scope: trio.CancelScope) -> None:
        try:
            await outbox.run()
        except trio.BrokenResourceError:
            connection_scope.cancel()

    async def _plan_steps(self) -> None:
        """Plan whenever requests have come or gone."""
        while True:
            self._changed = trio.Event()
            while self._plan():
                # what comes meanwhile is in the next step
                await trio.lowlevel.checkpoint()
            self._flush()
            await self._changed.wait()

    async def _commit_steps(self) -> None:
        """Take in results in the order of the plans; plan what comes next, then tell each server what it must hear."""
        while True:
            result = await self._ranks.wait_result()
            for connection, told in self._scheduler.commit(result).items():
                self._outboxes[connection].put_told(told)
            while self._plan():
                pass
            if trio.current_time() >= self._next_statistics:
                self._put_statistics()
            self._flush()

    def _plan(self) -> bool:
        """Have the ranks run one step more. False if there is none, or as many are in flight as may be."""
        plan = self._scheduler.plan()
        if plan is not None:
            if plan.new:
                for connection, request_id in self._scheduler.started(plan):
                    self._outboxes[connection].put_started(request_id)
                self._flush()
            self._ranks.send(plan)
        elif self._scheduler.is_idle and not self._was_idle:
            self._scheduler.check()
            self._put_statistics()
        elif not self._scheduler.is_idle and self._scheduler.num_in_flight == 0:
            raise RuntimeError("requests are open and nothing can run: a bug of the scheduler")
        self._was_idle = self._scheduler.is_idle
        return plan is not None

    def _flush(self) -> None:
        for outbox in self._outboxes.values():
            outbox.flush()

    def _put_statistics(self) -> None:
        self._next_statistics = trio.current_time() + STATISTICS_INTERVAL
        statistics = self._scheduler.statistics()
        for outbox in self._outboxes.values():
            outbox.put_statistics(statistics)


class Outbox:
    """What a server must still hear. A server that keeps up gets one frame a step; one that does not gets fewer."""

    def __init__(self, stream: trio.abc.SendStream, ready: EngineReady) -> None:
        self._sender = Sender(stream)
        self._sender.put(encode_frame(ready))
        self._started: list[int] = []
        self._told = StepEvents()
        self._statistics: EngineStatistics | None = None
        self._is_empty = True

    def put_started(self, request_id: int) -> None:
        self._started.append(request_id)
        self._is_empty = False

    def put_told(self, told: StepEvents) -> None:
        """What the requests must hear of one step."""
        # a frame has one token at most of each request beside its events: that of the last step
        self._told = StepEvents(events=self._told.all_events() + told.events, tokens=told.tokens)
        self._is_empty = False

    def put_statistics(self, statistics: EngineStatistics) -> None:
        self._statistics = statistics
        self._is_empty = False

    def flush(self) -> None:
        """Send what was put, unless the server has not taken yet what was sent before: then `run` does, later."""
        if self._is_empty or not self._sender.has_sent_all:
            return
        told = self._told
        frame = StepEvents(started=self._started, events=told.events, tokens=told.tokens, statistics=self._statistics)
        self._started, self._told, self._statistics, self._is_empty = [], StepEvents(), None, True
        self._sender.put(encode_frame(frame))

    async def run(self) -> None:
        """Send what `flush` could not, until cancelled. Raises trio.BrokenResourceError if the server is gone."""
        while True:
            self.flush()
            await self._sender.send_rest()

    async def wait_all_sent(self) -> None:
        """Wait until nothing is left that the server has not been sent."""
        while not (self._is_empty and self._sender.has_sent_all):
            await self._sender.wait_all_sent()
