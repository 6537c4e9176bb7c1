"""Spans as a receiver gets them: over HTTP, in OTLP's own format."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trio

from llmd.protocol.control import SystemState
from llmd.server.app import create_app
from tests.server.fake_engine import Answered, Application, application, run
from tests.server.logged import logged

service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from llmd.server.tracing import Tracer  # noqa: E402  # needs the packages that are asked for above

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@dataclass
class Receiver:
    """What has come in, and how it is answered."""

    status: int = 200
    url: str = ""
    num_posts: int = 0
    spans: list[Any] = field(default_factory=list)
    services: list[str] = field(default_factory=list)

    def take_in(self, body: bytes) -> None:
        self.num_posts += 1
        if self.status != 200:
            return
        for resource in service.ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services += [
                attribute.value.string_value
                for attribute in resource.resource.attributes
                if attribute.key == "service.name"
            ]
            for scope in resource.scope_spans:
                self.spans += scope.spans


@contextmanager
def receiver(status: int = 200) -> Iterator[Receiver]:
    received = Receiver(status)

    class Post(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            received.take_in(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(received.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Post)
    received.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()


def traced(running: Application, endpoint: str) -> tuple[Application, Tracer]:
    """The same application with a tracer."""
    tracer = Tracer(endpoint, running.server.state)
    return replace(running, app=create_app(running.server, listeners=[tracer.trace])), tracer


async def complete(running: Application, body: dict[str, Any], **headers: str) -> Answered:
    data = json.dumps({"prompt": "marker", **body}).encode()
    return await running.request(
        "POST", "/v1/completions", data, content_type="application/json", headers={"x-request-id": "trace-1", **headers}
    )


def attributes(span: Any) -> dict[str, Any]:
    def value(any_value: Any) -> Any:
        kind = any_value.WhichOneof("value")
        found = getattr(any_value, kind)
        return [value(item) for item in found.values] if kind == "array_value" else found

    return {attribute.key: value(attribute.value) for attribute in span.attributes}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_span_says_what_a_request_was(stream: bool, tiny_model_dir: Path) -> None:
    async def main() -> None:
        with receiver() as received:
            async with application(tiny_model_dir) as plain:
                running, tracer = traced(plain, received.url)
                body = {"n": 2, "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "stream": stream}
                traceparent = f"00-{TRACE_ID}-{PARENT_ID}-01"
                await complete(running, body, traceparent=traceparent, authorization="Bearer marker")
                await running.get("/health")
                await tracer.flush()
        (span,) = received.spans
        assert received.services == ["llmd"]
        assert (span.name, span.kind) == ("llm_request", span.SPAN_KIND_SERVER)
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
        assert span.status.code == span.status.STATUS_CODE_UNSET
        told = attributes(span)
        expected = {
            "gen_ai.request.id": "trace-1",
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": "tiny",
            "gen_ai.response.model": "tiny",
            "gen_ai.request.n": 2,
            "gen_ai.request.max_tokens": 4,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.top_p": 0.9,
            "gen_ai.usage.num_sequences": 2,
            "gen_ai.usage.prompt_tokens": 6,
            "gen_ai.usage.completion_tokens": 8,
            "gen_ai.response.finish_reasons": ["length", "length"],
            "http.request.method": "POST",
            "http.route": "/v1/completions",
            "http.response.status_code": 200,
        }
        assert {name: told[name] for name in expected} == expected
        seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        assert told["gen_ai.latency.e2e"] == pytest.approx(seconds, abs=1e-6)
        names = ("time_in_queue", "time_to_first_token", "e2e")
        latencies = [told[f"gen_ai.latency.{name}"] for name in names]
        assert latencies[0] >= 0
        assert latencies == sorted(latencies)
        assert b"marker" not in span.SerializeToString()

    run(main, uses_threads=True)


def test_a_request_that_is_refused_or_fails_has_its_span(tiny_model_dir: Path) -> None:
    async def main() -> None:
        with receiver() as received:
            async with application(tiny_model_dir, error_after=2) as plain:
                running, tracer = traced(plain, received.url)
                assert (await complete(running, {"marker": 1})).status == 400
                assert (await complete(running, {})).status == 500
                assert (await complete(running, {"stream": True})).status == 200
                await tracer.flush()
        refused, failed, cut = received.spans
        assert [attributes(span)["http.response.status_code"] for span in received.spans] == [400, 500, 200]
        assert [attributes(span).get("error.type") for span in received.spans] == [None, "500", "error"]
        assert failed.status.code == cut.status.code == cut.status.STATUS_CODE_ERROR != refused.status.code
        assert refused.parent_span_id == b""
        assert len({span.trace_id for span in received.spans}) == 3

    run(main, uses_threads=True)


def test_a_restart_of_the_engine_is_an_event_of_what_it_hit(tiny_model_dir: Path) -> None:
    async def main() -> None:
        with receiver() as received:
            async with application(tiny_model_dir, die_after=[2]) as plain:
                running, tracer = traced(plain, received.url)

                async def note_restart() -> None:
                    await running.engine.wait_until(lambda: running.engine.num_connections == 2)
                    running.server.state.update(SystemState(stage=running.server.state.current.stage, restarts=1))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(note_restart)
                    assert (await complete(running, {"max_tokens": 200})).status == 200
                await complete(running, {})
                await tracer.flush()
        hit, later = received.spans
        assert [event.name for event in hit.events] == ["engine_restart"]
        assert hit.start_time_unix_nano <= hit.events[0].time_unix_nano <= hit.end_time_unix_nano
        assert not later.events

    run(main, uses_threads=True)


def test_a_receiver_that_fails_costs_spans_and_one_line(tiny_model_dir: Path) -> None:
    async def main() -> None:
        with receiver(status=400) as received:
            async with application(tiny_model_dir) as plain:
                running, tracer = traced(plain, received.url)
                with logged() as log:
                    for _ in range(3):
                        assert (await complete(running, {})).status == 200
                        await tracer.flush()
                    assert received.num_posts == 3
                    warnings = [line["message"] for line in log.lines if line["logger"] == "llmd.server.tracing"]
                    assert warnings == [f"spans do not get to {received.url}/v1/traces: they are dropped until they do"]
                    received.status = 200
                    await complete(running, {})
                    await tracer.flush()
                    assert len(received.spans) == 1
                    assert [line["level"] for line in log.lines if "again" in line["message"]] == ["warning"]

    run(main, uses_threads=True)


def test_a_receiver_that_is_gone_holds_up_nobody(tiny_model_dir: Path) -> None:
    async def main() -> None:
        with receiver() as received:
            gone = received.url
        async with application(tiny_model_dir) as plain:
            running, tracer = traced(plain, gone)
            for _ in range(20):
                assert (await complete(running, {"max_tokens": 2})).status == 200
            # the SDK tries for a while; the end of the process does not wait for it
            with trio.fail_after(10):
                await tracer.flush()

    run(main, uses_threads=True)


def test_without_the_flag_nothing_of_it_is_imported() -> None:
    code = (
        "import sys, llmd.server.process, llmd.cli.serve\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
