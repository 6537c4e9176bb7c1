"""OpenTelemetry spans of requests, over OTLP and HTTP. Imported only where an endpoint is given: it needs llmd[otel].

Names of attributes are those of the GenAI semantic conventions as vLLM writes them. No span has text of a prompt or
of an answer. Sending is done by a thread of the SDK: a receiver that is slow or gone costs spans, never a request.
"""

import logging
from collections.abc import Sequence
from typing import Any

import trio
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import llmd
from llmd.config import SECONDS
from llmd.server.context import StateBoard
from llmd.server.question import Question
from llmd.server.request_record import CLIENT_LEFT, Generated, RequestRecord

SPAN_NAME = "llm_request"
FLUSH_TIMEOUT = 1 * SECONDS
_EXPORT_TIMEOUT = 5 * SECONDS
# only these ask the model; a span for every look at /health would hide them
_TRACED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})

_log = logging.getLogger(__name__)


class Tracer:
    """One server process's spans. `endpoint` is the whole URL; one without a path gets OTLP's own, /v1/traces."""

    def __init__(self, endpoint: str, state: StateBoard) -> None:
        self._state = state
        # it tells of every batch that is lost, with a trace; we tell of the first
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        exporter = _Exporter(endpoint if "/" in endpoint.partition("://")[2] else f"{endpoint}/v1/traces")
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("llmd", llmd.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def trace(self, record: RequestRecord) -> None:
        """Hand over the span of a request that has ended. Never waits."""
        if _route(record) not in _TRACED_PATHS:
            return

        def unix_nanoseconds(time: float) -> int:
            return int((record.unix_time + time - record.arrived) * 1e9)

        span = self._tracer.start_span(
            SPAN_NAME,
            context=self._propagator.extract(record.headers),
            kind=SpanKind.SERVER,
            attributes=_attributes(record),
            start_time=unix_nanoseconds(record.arrived),
        )
        if record.question is not None:
            for restarted_at in self._state.restarts_since(record.arrived):
                span.add_event("engine_restart", timestamp=unix_nanoseconds(restarted_at))
        if failure := _failure(record):
            span.set_attribute("error.type", failure)
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_time=unix_nanoseconds(record.ended_at))

    async def flush(self) -> None:
        """Send what is pending, if that goes quickly; the process may end after it."""
        with trio.move_on_after(FLUSH_TIMEOUT):
            await trio.to_thread.run_sync(
                lambda: self._provider.force_flush(int(1000 * FLUSH_TIMEOUT)), abandon_on_cancel=True
            )


class _Exporter(SpanExporter):
    """OTLP's exporter, which says once that nothing gets through, and once that it does again."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._inner = OTLPSpanExporter(endpoint, timeout=_EXPORT_TIMEOUT)
        self._is_failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self._is_failing:
            _log.warning("spans do not get to %s: they are dropped until they do", self._endpoint)
        elif self._is_failing and not is_failing:
            _log.warning("spans get to %s again", self._endpoint)
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._inner.force_flush(timeout_millis)


def _resource() -> Resource:
    """With the service's name from OpenTelemetry's own environment variables, if they give one."""
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "llmd"}))
    return resource


def _route(record: RequestRecord) -> str:
    # routes are not strict about a slash at the end
    return record.path.rstrip("/")


def _attributes(record: RequestRecord) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.request.id": record.request_id,
        "gen_ai.latency.e2e": record.ended_at - record.arrived,
        "http.request.method": record.method,
        "http.route": _route(record),
        "http.response.status_code": CLIENT_LEFT if record.client_left else record.status,
    }
    if record.question is not None:
        attributes |= _question_attributes(record.question)
    if record.answer is not None:
        attributes |= _answer_attributes(record.answer)
    if record.queue_seconds is not None:
        attributes["gen_ai.latency.time_in_queue"] = record.queue_seconds
    return attributes


def _question_attributes(question: Question) -> dict[str, Any]:
    sampling = question.sampling[0]
    return {
        "gen_ai.operation.name": "chat" if question.id.startswith("chatcmpl") else "text_completion",
        "gen_ai.request.model": question.model,
        "gen_ai.response.model": question.model,
        "gen_ai.response.id": question.id,
        "gen_ai.request.n": question.request.n,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.usage.num_sequences": question.num_choices,
    }


def _answer_attributes(answer: Generated) -> dict[str, Any]:
    usage = answer.usage()
    attributes: dict[str, Any] = {
        "gen_ai.usage.prompt_tokens": usage.prompt_tokens,
        "gen_ai.usage.completion_tokens": usage.completion_tokens,
        "gen_ai.response.finish_reasons": answer.finish_reasons,
    }
    if answer.first_token_seconds is not None:
        attributes["gen_ai.latency.time_to_first_token"] = answer.first_token_seconds
    return attributes


def _failure(record: RequestRecord) -> str | None:
    """What kind of failure this was, in a word; None if it was none, or the client's own."""
    if record.client_left:
        return "client_left"
    if record.status >= 500:
        return str(record.status)
    if not record.is_complete:
        return "cut_short"
    if record.answer is not None and "error" in record.answer.finish_reasons:
        return "error"
    return None
