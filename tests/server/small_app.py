"""An application for tests of what is below the routes: whatever a connection can be made to suffer."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio
import trio.testing
from quart import Response, request
from quart_trio import QuartTrio

from llmd.server.connection import ClientConnection
from llmd.server.error_handlers import register_error_handlers
from llmd.server.request_body import read_json_body
from llmd.server.responses import Send, StreamResponse, json_response
from tests.server.live import (
    CLOSE,
    SOON,
    LiveServer,
    http_request,
    parse_answer,
)

EVENT = b"data: x\n\n"


class SmallApp:
    """Routes that do what a trap needs, and what became of those that take long."""

    def __init__(self, *, max_body_bytes: int = 1 << 20, body_timeout: float = 5) -> None:
        self.begun = 0
        self.ended = 0
        self.cancelled = 0
        self.app = QuartTrio(__name__, static_folder=None)
        self.app.asgi_http_class = ClientConnection
        self.app.config["MAX_CONTENT_LENGTH"] = max_body_bytes
        self.app.config["BODY_TIMEOUT"] = body_timeout
        # Quart's own is a minute
        self.app.config["RESPONSE_TIMEOUT"] = 0.05
        register_error_handlers(self.app)
        for route in (self.quick, self.wait, self.stream, self.hang, self.flood, self.fail):
            self.app.add_url_rule(f"/{route.__name__}", view_func=route)
        self.app.add_url_rule("/echo", view_func=self.echo, methods=["POST"])

    def is_working(self) -> bool:
        return self.begun > self.ended

    @contextmanager
    def traced(self) -> Iterator[None]:
        self.begun += 1
        try:
            yield
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.ended += 1

    async def quick(self) -> Response:
        return json_response({"ok": True})

    async def echo(self) -> Response:
        return Response(await read_json_body())

    async def wait(self) -> Response:
        with self.traced():
            await trio.sleep_forever()
        raise AssertionError

    async def stream(self) -> Response:
        """`count` events, `pause` seconds apart."""
        count, pause = int(request.args.get("count", 1)), float(request.args.get("pause", 0))

        async def run(send: Send) -> None:
            with self.traced():
                for _ in range(count):
                    await send(EVENT)
                    await trio.sleep(pause)

        return StreamResponse(run)

    async def hang(self) -> Response:
        """One event, and then nothing."""

        async def run(send: Send) -> None:
            with self.traced():
                await send(EVENT)
                await trio.sleep_forever()

        return StreamResponse(run)

    async def flood(self) -> Response:
        """Events without end."""

        async def run(send: Send) -> None:
            with self.traced():
                while True:
                    await send(b"z" * 65536)

        return StreamResponse(run)

    async def fail(self) -> Response:
        async def run(send: Send) -> None:
            await send(EVENT)
            raise KeyError("secret")

        return StreamResponse(run)


def num_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


async def assert_answers(server: LiveServer) -> None:
    with trio.fail_after(SOON):
        answer = parse_answer(await server.say(http_request("/quick", headers=CLOSE)))
    assert (answer.status, answer.json()) == (200, {"ok": True})
