"""Everything that Prometheus reads, put together: this server process, the others, the engine and the system.

Pure but for `own_figures`, which asks this process for its state. Knows no file and no socket.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import msgspec
import trio
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

from llmd.protocol.control import Stage
from llmd.protocol.figures import Family, Sample, ServerFigures
from llmd.protocol.generation import STEP_TOKENS_BUCKETS, EngineReady, EngineStatistics
from llmd.server.context import Server
from llmd.server.engine_history import totals
from llmd.server.families import Labels, added_up, counter, gauge, merged
from llmd.server.figures import Others

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# today's name → the one that older dashboards know
_OLD_NAMES = {
    "vllm:kv_cache_usage_perc": "vllm:gpu_cache_usage_perc",
    "vllm:prefix_cache_queries": "vllm:gpu_prefix_cache_queries",
    "vllm:prefix_cache_hits": "vllm:gpu_prefix_cache_hits",
    "vllm:inter_token_latency_seconds": "vllm:time_per_output_token_seconds",
}

_NO_ENGINE = (Stage.RESTARTING, Stage.FAILED)

_NOTHING = EngineStatistics(
    num_running=0, num_waiting=0, num_blocks=0, num_free_blocks=0, num_steps=0, num_prompt_tokens=0,
    num_output_tokens=0, num_preemptions=0, prefix_cache_queries=0, prefix_cache_hits=0,
    step_tokens=[0] * (len(STEP_TOKENS_BUCKETS) + 1), step_tokens_sum=0,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """What is the same whichever server process is asked."""

    version: str
    started_at: float  # unix time, seconds
    stage: Stage
    restarts: int  # of the engine


def own_queue_age(server: Server) -> float:
    """Seconds since the oldest sequence of this process that has no first token came; 0 if there is none."""
    since = server.engine.waiting_since()
    return 0.0 if since is None else trio.current_time() - since


def own_figures(server: Server) -> ServerFigures:
    """What this process has to add to what the others know."""
    labels = server.metrics.model_labels
    resumed = counter(
        "llmd:resumed_requests", "Sequences that went on in a new engine.", labels, server.engine.num_resumed
    )
    counted = [*server.metrics.counted(), resumed]
    return ServerFigures(
        counted=added_up([counted, server.counted_before]) if server.counted_before else counted,
        process=server.metrics.process(),
        engine=server.engine.history,
        ready=server.engine.ready,
        num_open=server.engine.num_open,
        queue_age=own_queue_age(server),
    )


def exposition(labels: Labels, system: System, own: ServerFigures, others: Others) -> bytes:
    """The text that Prometheus reads, of the type `CONTENT_TYPE`. `labels`: of everything that is the model's."""
    everybody = [own, *others.figures]
    families = [
        *_system(system),
        *_engine(labels, system.stage, everybody),
        *added_up([figures.counted for figures in everybody]),
        gauge(
            "llmd:queue_age_seconds",
            "How long the oldest sequence without a first token has waited.",
            labels,
            max(figures.queue_age for figures in everybody),
        ),
        gauge(
            "llmd:servers_unreachable",
            "Server processes without a sign of life; what they had counted is still in the sums.",
            {},
            others.num_unreachable,
        ),
        *merged([figures.process for figures in everybody]),
    ]
    old = [_renamed(family, _OLD_NAMES[family.name]) for family in families if family.name in _OLD_NAMES]
    return _render([*families, *old])


def _system(system: System) -> Iterator[Family]:
    yield gauge("llmd:build_info", "The version of llmd.", {"version": system.version}, 1)
    yield gauge("llmd:start_time_seconds", "When `llmd serve` began, in unix time.", {}, system.started_at)
    stages = [Sample("llmd:stage", {"stage": str(stage)}, float(stage is system.stage)) for stage in Stage]
    yield Family("llmd:stage", "gauge", "1 for the stage that the system is in, 0 for the others.", stages)
    yield counter("llmd:engine_restarts", "Engines that were started to replace one that died.", {}, system.restarts)


def _engine(labels: Labels, stage: Stage, everybody: list[ServerFigures]) -> Iterator[Family]:
    """Of the engine there is one view only: counters from who has listened longest, the state from who is connected."""
    known = [total for figures in everybody if (total := totals(figures.engine)) is not None]
    counters = max(known, key=lambda total: total.num_steps, default=_NOTHING)
    # what the others have left may be older than the engine's death
    views = [] if stage in _NO_ENGINE else [(figures.ready, figures.engine.latest) for figures in everybody]
    ready, state = next(((ready, latest) for ready, latest in views if ready and latest), (None, None))
    if ready is None or state is None:
        # nothing runs, and whatever is open waits for the engine that comes
        num_open = sum(figures.num_open for figures in everybody)
        state = msgspec.structs.replace(_NOTHING, num_waiting=num_open)
    else:
        yield _cache_layout(labels, ready)
    usage = 1 - state.num_free_blocks / state.num_blocks if state.num_blocks else 0.0
    queries, hits = counters.prefix_cache_queries, counters.prefix_cache_hits
    yield gauge("vllm:num_requests_running", "Sequences that the engine computes.", labels, state.num_running)
    yield gauge("vllm:num_requests_waiting", "Sequences that wait for their turn.", labels, state.num_waiting)
    yield gauge(
        "vllm:num_requests_waiting_by_reason",
        "The same, by why they wait.",
        {**labels, "reason": "capacity"},
        state.num_waiting,
    )
    yield gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", labels, usage)
    yield gauge(
        "vllm:gpu_prefix_cache_hit_rate",
        "Share of the tokens looked up that the prefix cache held, since the start, 0 to 1.",
        labels,
        hits / queries if queries else 0.0,
    )
    yield counter("vllm:num_preemptions", "Sequences put back for lack of blocks.", labels, counters.num_preemptions)
    yield counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", labels, queries)
    yield counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", labels, hits)
    yield _step_tokens(labels, counters)


def _cache_layout(labels: Labels, ready: EngineReady) -> Family:
    layout = {
        "block_size": str(ready.block_size),
        "num_gpu_blocks": str(ready.num_blocks),
        "max_model_len": str(ready.max_model_len),
    }
    return gauge("vllm:cache_config_info", "The KV cache's layout.", {**labels, **layout}, 1)


def _step_tokens(labels: Labels, counters: EngineStatistics) -> Family:
    name = "vllm:iteration_tokens_total"
    bounds = [*map(floatToGoString, STEP_TOKENS_BUCKETS), "+Inf"]
    samples = [
        Sample(f"{name}_bucket", {**labels, "le": bound}, count)
        for bound, count in zip(bounds, accumulate(counters.step_tokens), strict=True)
    ]
    samples.append(Sample(f"{name}_count", labels, sum(counters.step_tokens)))
    samples.append(Sample(f"{name}_sum", labels, counters.step_tokens_sum))
    return Family(name, "histogram", "Tokens of a step of the engine.", samples)


def _renamed(family: Family, name: str) -> Family:
    samples = [
        Sample(name + sample.name.removeprefix(family.name), sample.labels, sample.value) for sample in family.samples
    ]
    return Family(name, family.kind, f"{family.help} Today's name is {family.name}.", samples)


def _render(families: list[Family]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(families))
    return generate_latest(registry)


class _Collected:
    """Families as the library that renders them wants them."""

    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.help, family.kind)
            for sample in family.samples:
                metric.add_sample(sample.name, sample.labels, sample.value)
            yield metric
