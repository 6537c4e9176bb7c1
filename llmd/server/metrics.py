"""What one server process counts, under the names that vLLM's dashboards know. Knows neither requests nor the engine.

`exposition` puts this together with the engine's figures and those of the other server processes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

from llmd.protocol.figures import Family, Sample

# of one engine there is only the first
ENGINE = "0"
LABELS = ("model_name", "engine")

# vLLM's, in seconds
_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
# in tokens; vLLM ends them at the model's length, which is not known when this starts
_TOKEN_BUCKETS = (*(digit * 10**power for power in range(6) for digit in (1, 2, 5)), 1_000_000)
_CHOICE_BUCKETS = (1, 2, 5, 10, 20)
# prometheus-fastapi-instrumentator's, in seconds
_HTTP_BUCKETS = (0.1, 0.5, 1.0)

_FINISHED_REASONS = ("stop", "length", "abort", "error")
_REJECTED_REASONS = ("queued_reqs", "queued_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTimes:
    """When what happened to a sequence that has ended, in seconds after the arrival of its HTTP request."""

    submitted: float  # to the engine
    started: float | None  # it ran for the first time; None if it never did, or nobody said when
    first_token: float | None  # None if there was none
    ended: float


class Metrics:
    """The counters of one server process. Each has its own registry, so that several can live in one test."""

    def __init__(self, model_name: str, *, server: str = "0") -> None:
        self.model_labels = dict(zip(LABELS, (model_name, ENGINE), strict=True))
        self._server = server
        self._registry = CollectorRegistry(auto_describe=False)
        self._process_registry = CollectorRegistry(auto_describe=False)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._process_registry)
        self._count_tokens()
        self._count_requests()
        self._measure_requests()
        self._count_http()

    def _count_tokens(self) -> None:
        self._prompt_tokens = self._counter(
            "vllm:prompt_tokens", "Prompt tokens of sequences that have begun to answer."
        )
        self._cached_tokens = self._counter("vllm:prompt_tokens_cached", "Those of them that the prefix cache held.")
        by_source = self._counters(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where their KV came from.", "source"
        )
        self._computed = by_source.labels(*self._label_values, "local_compute")
        self._from_cache = by_source.labels(*self._label_values, "local_cache_hit")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Output tokens that came from the engine.")
        lookups = self._counters(
            "llmd:prefix_lookups", "Sequences that have begun to answer, by whether the prefix cache helped.", "result"
        )
        self._lookups = {result: lookups.labels(*self._label_values, result) for result in ("hit", "miss")}

    def _count_requests(self) -> None:
        success = self._counters("vllm:request_success", "Sequences that ended, by how.", "finished_reason")
        self._success = {reason: success.labels(*self._label_values, reason) for reason in _FINISHED_REASONS}
        rejections = self._counters(
            "vllm:admission_rejections", "Requests refused for a full queue (429), by the bound reached.", "reason"
        )
        self._rejections = {reason: rejections.labels(*self._label_values, reason) for reason in _REJECTED_REASONS}

    def _measure_requests(self) -> None:
        # seconds
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN_BUCKETS
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "From one token of a sequence to the next.", _INTER_TOKEN_BUCKETS
        )
        self._per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time per output token after the first, by sequence.",
            _INTER_TOKEN_BUCKETS,
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to a sequence's end.", _LATENCY_BUCKETS
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", "How long a sequence waited for its turn.", _LATENCY_BUCKETS
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From a sequence's turn to its first token.", _LATENCY_BUCKETS
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From a sequence's first token to its end.", _LATENCY_BUCKETS
        )
        self._inference = self._histogram(
            "request_inference_time_seconds", "From a sequence's turn to its end.", _LATENCY_BUCKETS
        )
        # tokens and choices
        self._request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a sequence.", _TOKEN_BUCKETS
        )
        self._request_computed_tokens = self._histogram(
            "request_prefill_kv_computed_tokens", "Those of them that the prefix cache did not hold.", _TOKEN_BUCKETS
        )
        self._request_output_tokens = self._histogram(
            "request_generation_tokens", "Output tokens of a sequence.", _TOKEN_BUCKETS
        )
        self._request_max_output_tokens = self._histogram(
            "request_max_num_generation_tokens", "Output tokens of the longest of a prompt's `n`.", _TOKEN_BUCKETS
        )
        self._params_n = self._histogram("request_params_n", "`n` of a prompt.", _CHOICE_BUCKETS)
        self._params_max_tokens = self._histogram(
            "request_params_max_tokens", "`max_tokens` of a sequence.", _TOKEN_BUCKETS
        )

    def _count_http(self) -> None:
        labels = ("handler", "method", "status")
        self._http = Counter("http_requests", "HTTP answers begun.", labels, registry=self._registry)
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "From an HTTP request to the end of its answer, streams included.",
            labels,
            buckets=_HTTP_BUCKETS,
            registry=self._registry,
        )
        self._http_open = Gauge("http_requests_inprogress", "HTTP requests being answered.", registry=self._registry)

    def began(self, *, prompt_tokens: int, cached_tokens: int) -> None:
        """A sequence has its first token: its prompt is computed, but for what the prefix cache held."""
        self._prompt_tokens.inc(prompt_tokens)
        self._cached_tokens.inc(cached_tokens)
        self._computed.inc(prompt_tokens - cached_tokens)
        self._from_cache.inc(cached_tokens)
        self._lookups["hit" if cached_tokens else "miss"].inc()

    def output_tokens(self, num_tokens: int) -> None:
        """So many tokens came from the engine, of any sequences."""
        self._generation_tokens.inc(num_tokens)

    def first_token(self, seconds: float) -> None:
        """From the request's arrival to its first token."""
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        """From one token event of a sequence to the next."""
        self._inter_token.observe(seconds)

    def finished(
        self,
        reason: str,
        times: SequenceTimes,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: int,
        max_tokens: int,
    ) -> None:
        """One sequence has ended: "stop", "length", "abort" (the client left) or "error"."""
        self._success[reason].inc()
        self._request_prompt_tokens.observe(prompt_tokens)
        self._request_output_tokens.observe(output_tokens)
        self._params_max_tokens.observe(max_tokens)
        self._observe_times(times, output_tokens)
        if times.first_token is not None:
            self._request_computed_tokens.observe(prompt_tokens - cached_tokens)

    def _observe_times(self, times: SequenceTimes, output_tokens: int) -> None:
        self._e2e.observe(times.ended)
        if times.started is not None:
            self._queue.observe(times.started - times.submitted)
            self._inference.observe(times.ended - times.started)
            if times.first_token is not None:
                self._prefill.observe(times.first_token - times.started)
        elif times.first_token is None:
            # it left before its turn: without these, the longest waits would be missing
            self._queue.observe(times.ended - times.submitted)
        if times.first_token is not None:
            decode_seconds = times.ended - times.first_token
            self._decode.observe(decode_seconds)
            if output_tokens > 1:
                self._per_output_token.observe(decode_seconds / (output_tokens - 1))

    def prompt_finished(self, *, n: int, max_output_tokens: int) -> None:
        """All answers to one prompt have ended; `max_output_tokens`: of the longest."""
        self._params_n.observe(n)
        self._request_max_output_tokens.observe(max_output_tokens)

    def rejected(self, reason: str) -> None:
        """A request was refused with 429: "queued_reqs" or "queued_tokens"."""
        self._rejections[reason].inc()

    def http_request(self) -> "HttpRequest":
        """An HTTP request has come. Leave it as a block when the last byte of the answer is written."""
        return HttpRequest(self._http, self._http_seconds, self._http_open)

    def counted(self) -> list[Family]:
        """Everything that may be added up over server processes."""
        return list(_families(self._registry, {}))

    def process(self) -> list[Family]:
        """CPU, memory and garbage collection of this process."""
        return list(_families(self._process_registry, {"server": self._server}))

    @property
    def _label_values(self) -> tuple[str, ...]:
        return tuple(self.model_labels.values())

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", help_text, LABELS, buckets=buckets, registry=self._registry)
        return histogram.labels(*self._label_values)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, LABELS, registry=self._registry).labels(*self._label_values)

    def _counters(self, name: str, help_text: str, label: str) -> Counter:
        return Counter(name, help_text, (*LABELS, label), registry=self._registry)


class HttpRequest:
    """One HTTP request, from its arrival to the last byte of its answer."""

    def __init__(self, answers: Counter, seconds: Histogram, num_open: Gauge) -> None:
        self._answers = answers
        self._seconds = seconds
        self._num_open = num_open
        self._arrived = time.monotonic()
        self._labels: tuple[str, str, str] | None = None
        num_open.inc()

    def answered(self, *, handler: str, method: str, status: int) -> None:
        """The answer has begun. `handler` is the route's path with its placeholders, never the client's."""
        self._labels = (handler, method, str(status))
        self._answers.labels(*self._labels).inc()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._num_open.dec()
        if self._labels is not None:
            self._seconds.labels(*self._labels).observe(time.monotonic() - self._arrived)


def _families(registry: CollectorRegistry, labels: dict[str, str]) -> Iterator[Family]:
    for metric in registry.collect():
        # when a series began is what Prometheus finds out itself; a sum of such times means nothing
        samples = [
            Sample(sample.name, {**sample.labels, **labels}, sample.value)
            for sample in metric.samples
            if not sample.name.endswith("_created")
        ]
        yield Family(metric.name, metric.type, metric.documentation, samples)
