"""Ties a request to its client: who leaves is not worked for. Knows nothing of sockets or of what a route does."""

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import trio
from quart import request as current_request
from quart.typing import ResponseTypes
from quart.utils import encode_headers
from quart.wrappers import Request
from quart_trio.asgi import TrioASGIHTTPConnection

from llmd.errors import Unavailable
from llmd.server.body_memory import BodyMemory, HeldBody
from llmd.server.error_handlers import error_body, error_response
from llmd.server.responses import DONE, StreamResponse

Message = Any  # an ASGI event: a dictionary with a "type"
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_log = logging.getLogger(__name__)
# of an ASGI scope
_HELD = "llmd.held"
_BODY = "llmd.body"


def hold(resource: AbstractContextManager[object]) -> None:
    """Leave this block when the current request ends, however that comes about.

    A route that streams has returned before its stream begins: what it has opened belongs to the request meanwhile.
    """
    current_request.scope[_HELD].push(resource)  # type: ignore[literal-required]  # a key of our own


def held_body() -> HeldBody:
    """What the current request's body takes of the memory for bodies."""
    body: HeldBody = current_request.scope[_BODY]  # type: ignore[literal-required]
    return body


class OpenRequests:
    """The requests that a server works on, so that its shutdown can wait for them, and end them.

    It reaches the requests as `scope["state"]["open_requests"]`, the way that ASGI has for such things.
    """

    def __init__(self) -> None:
        self._count = 0
        self._work: set[trio.CancelScope] = set()
        self._idle = trio.Event()

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """A request, from its first byte to the last of its answer."""
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
            if self._count == 0:
                self._idle.set()
                self._idle = trio.Event()

    @contextmanager
    def work(self) -> Iterator[trio.CancelScope]:
        """The part of a request that a shutdown may cut; sending what there is to say goes on after it."""
        with trio.CancelScope() as scope:
            self._work.add(scope)
            try:
                yield scope
            finally:
                self._work.remove(scope)

    async def wait_none(self) -> None:
        while self._count:
            await self._idle.wait()

    def cut_all(self) -> None:
        for scope in self._work:
            scope.cancel()


class ClientConnection(TrioASGIHTTPConnection):
    """One request and its answer. If the client leaves before the last byte is handed over, all of it is cancelled.

    After that it is not: Hypercorn reports `http.disconnect` from inside the last `send`, where Quart-Trio would cancel
    the very code that closes the connection or starts to wait for the next request.
    """

    async def __call__(self, receive: Receive, send: Send) -> None:
        state = self.scope.get("state", {})
        self._open_requests: OpenRequests = state.get("open_requests") or OpenRequests()
        limit = self.app.config["MAX_CONTENT_LENGTH"]
        self._body = HeldBody(state.get("body_memory") or BodyMemory.for_bodies_of(limit))
        self._started = False
        self._ending = False
        self._body_bytes = 0

        async def receive_next() -> Message:
            return await self._receive(receive)

        async def send_noting_progress(message: Message) -> None:
            self._started = True
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                self._ending = True
            await send(message)

        with self._open_requests.one_more(), ExitStack() as held:
            held.callback(self._body.release)
            self.scope[_HELD] = held  # type: ignore[literal-required]
            self.scope[_BODY] = self._body  # type: ignore[literal-required]
            try:
                await super().__call__(receive_next, send_noting_progress)
            except* Exception as errors:
                response = error_response(errors)
                if not self._started:
                    await self._send_response(send, response)

    async def _receive(self, receive: Receive) -> Message:
        """The next event, but no disconnect after the answer's end, and no more body than there is room for."""
        limit = self.app.config["MAX_CONTENT_LENGTH"]
        while True:
            message = await receive()
            if message["type"] == "http.request":
                if self._body_bytes > limit or self._body.is_refused:
                    continue
                num_bytes = len(message.get("body", b""))
                self._body_bytes += num_bytes
                if self._body_bytes > limit:
                    # Quart sees that this is too much, and has no need to see the rest
                    return {**message, "more_body": False}
                if not self._body.hold(num_bytes):
                    # whoever reads the body asks why it ends here
                    return {**message, "body": b"", "more_body": False}
            elif message["type"] == "http.disconnect" and self._ending:
                await trio.sleep_forever()
            return message

    async def handle_request(  # type: ignore[override]  # as in Quart-Trio's own class
        self, nursery: trio.Nursery, request: Request, send: Send
    ) -> None:
        response: ResponseTypes
        with self._open_requests.work() as work:
            response = await self.app.handle_request(request)
        if work.cancelled_caught:
            response = error_response(_shutting_down())
        await self._send_response(send, response)
        nursery.cancel_scope.cancel()

    async def _send_response(self, send: Send, response: ResponseTypes) -> None:
        if not isinstance(response, StreamResponse):
            await super()._send_response(send, response)
            return
        headers = encode_headers(response.headers)
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await self._send_stream(send, response)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_stream(self, send: Send, response: StreamResponse) -> None:
        is_done = False

        async def send_bytes(data: bytes) -> None:
            nonlocal is_done
            is_done = data.endswith(DONE)
            await send({"type": "http.response.body", "body": data, "more_body": True})

        failure: Exception | None = None
        with self._open_requests.work() as work:
            try:
                await response.run(send_bytes)
            except Exception as error:
                _log.error("a stream failed", exc_info=error)
                failure = error
        if work.cancelled_caught:
            failure = _shutting_down()
        # a shutdown may cut a stream whose end is still on its way to a slow client: it has only one end
        if failure is not None and not is_done:
            await send_bytes(b"data: " + error_body(failure) + b"\n\n" + DONE)


def _shutting_down() -> Unavailable:
    return Unavailable("The server is shutting down. Please try again.")
