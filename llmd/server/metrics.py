"""What Prometheus reads, under the names that vLLM's dashboards know. Knows neither requests nor the engine socket."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from llmd.protocol.generation import EngineReady, EngineStatistics

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# of one engine there is only the first
_ENGINE = "0"
_LABELS = ("model_name", "engine")

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


class Metrics:
    """The figures of one server process. Each has its own registry, so that several can live in one test."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._labels = (model_name, _ENGINE)
        self._engine = _EngineCollector(self._labels)
        self._registry.register(self._engine)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN_BUCKETS
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "From one token of a sequence to the next.", _INTER_TOKEN_BUCKETS
        )
        self._per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time per output token after the first, by request.",
            _INTER_TOKEN_BUCKETS,
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token.", _LATENCY_BUCKETS
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From a request's first token to its last.", _LATENCY_BUCKETS
        )
        self._prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_BUCKETS)
        self._output_tokens = self._histogram(
            "request_generation_tokens", "Output tokens of a request.", _TOKEN_BUCKETS
        )
        self._params_n = self._histogram("request_params_n", "`n` of a request.", _CHOICE_BUCKETS)
        self._params_max_tokens = self._histogram(
            "request_params_max_tokens", "`max_tokens` of a request.", _TOKEN_BUCKETS
        )
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended, by how.",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        self._rejections = Counter(
            "vllm:admission_rejections",
            "Requests refused because the queue was full, by the bound that was reached.",
            (*_LABELS, "reason"),
            registry=self._registry,
        )
        self._http = Counter(
            "http_requests", "HTTP answers begun.", ("handler", "method", "status"), registry=self._registry
        )

    def engine_ready(self, ready: EngineReady) -> None:
        """The engine has told its cache's size."""
        self._engine.ready = ready

    def engine_statistics(self, statistics: EngineStatistics) -> None:
        """The engine's latest state and counters. They begin again at 0 with every engine, as counters may."""
        self._engine.statistics = statistics

    def first_token(self, seconds: float) -> None:
        """From the request's arrival to its first token."""
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        """From one token event of a sequence to the next."""
        self._inter_token.observe(seconds)

    def finished(
        self,
        reason: str,
        *,
        prompt_tokens: int,
        output_tokens: int,
        e2e_seconds: float,
        n: int,
        max_tokens: int,
        first_token_seconds: float | None = None,
    ) -> None:
        """One sequence has ended: "stop", "length", "abort" (the client left) or "error".

        `first_token_seconds` is from the request's arrival; None if no token came.
        """
        self._success.labels(*self._labels, reason).inc()
        self._e2e.observe(e2e_seconds)
        self._prompt_tokens.observe(prompt_tokens)
        self._output_tokens.observe(output_tokens)
        self._params_n.observe(n)
        self._params_max_tokens.observe(max_tokens)
        if first_token_seconds is not None:
            decode_seconds = e2e_seconds - first_token_seconds
            self._decode.observe(decode_seconds)
            if output_tokens > 1:
                self._per_output_token.observe(decode_seconds / (output_tokens - 1))

    def rejected(self, reason: str) -> None:
        """A request was refused with 429: "queued_reqs" or "queued_tokens"."""
        self._rejections.labels(*self._labels, reason).inc()

    def http_answer(self, *, handler: str, method: str, status: int) -> None:
        """An answer has begun. `handler` is the route's path with its placeholders, never the client's."""
        self._http.labels(handler, method, str(status)).inc()

    def render(self) -> bytes:
        """Everything in Prometheus' text format, of the type `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", help_text, _LABELS, buckets=buckets, registry=self._registry)
        return histogram.labels(*self._labels)


class _EngineCollector:
    """Renders what the engine told last; nothing before it has told anything."""

    def __init__(self, labels: tuple[str, str]) -> None:
        self._label_values = labels
        self.ready: EngineReady | None = None
        self.statistics: EngineStatistics | None = None

    def collect(self) -> Iterator[Metric]:
        if self.ready is not None:
            yield self._cache_config(self.ready)
        if self.statistics is not None:
            yield from self._figures(self.statistics)

    def _cache_config(self, ready: EngineReady) -> Metric:
        family = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache's layout.",
            labels=(*_LABELS, "block_size", "num_gpu_blocks", "max_model_len"),
        )
        layout = (str(ready.block_size), str(ready.num_blocks), str(ready.max_model_len))
        family.add_metric((*self._label_values, *layout), 1)
        return family

    def _figures(self, now: EngineStatistics) -> Iterator[Metric]:
        usage = 1 - now.num_free_blocks / now.num_blocks if now.num_blocks else 0.0
        yield self._gauge("num_requests_running", "Sequences that the engine computes.", now.num_running)
        yield self._gauge("num_requests_waiting", "Sequences that wait for their turn.", now.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", usage)
        yield self._counter("prompt_tokens", "Prompt tokens computed.", now.num_prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", now.num_output_tokens)
        yield self._counter("num_preemptions", "Sequences put back for lack of blocks.", now.num_preemptions)
        yield self._counter("prefix_cache_queries", "Tokens looked up in the cache.", now.prefix_cache_queries)
        yield self._counter("prefix_cache_hits", "Tokens found in the cache.", now.prefix_cache_hits)

    def _gauge(self, name: str, help_text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", help_text, labels=_LABELS)
        family.add_metric(self._label_values, value)
        return family

    def _counter(self, name: str, help_text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", help_text, labels=_LABELS)
        family.add_metric(self._label_values, value)
        return family
