"""The picture that `llmd status` draws: from what a server said to figures, and from figures to lines. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from llmd.cli.samples import Samples, quantile, since
from llmd.cli.scrape import Scrape

_BAR_WIDTH = 30
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
# outcome of a sequence → in the words of a reader
_OUTCOMES = ("stop", "length", "abort", "error")


@dataclass(frozen=True, slots=True)
class Quantiles:
    """In seconds; None if nothing was observed."""

    p50: float | None
    p95: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recent:
    """What went on between two scrapes, or since the start."""

    seconds: float
    prompt_tokens: float
    generation_tokens: float
    first_token: Quantiles
    next_token: Quantiles
    prefix_hit_rate: float | None  # share of prompt tokens; None if there were none


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What `/metrics` says, as far as the picture shows it."""

    version: str
    model: str
    uptime: float  # seconds
    num_servers: int
    num_unreachable: int
    running: int
    waiting: int
    queue_age: float  # seconds
    cache_usage: float  # 0 … 1
    cache_tokens: int | None  # that the KV cache holds; None while there is no engine
    ended: dict[str, int]
    refused: int
    preempted: int
    resumed: int
    whole: Recent  # since the start
    recent: Recent | None  # None without an earlier scrape


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A running server, at one moment."""

    address: str
    stage: str  # "ready", another stage of the server's, or "unreachable"
    detail: str
    progress: float | None
    restarts: int
    figures: Figures | None
    problem: str = ""


def picture(address: str, now: Scrape, before: Scrape | None = None, *, wall_time: float) -> Picture:
    """What to show of a scrape, with rates since an earlier one. `wall_time`: unix time, seconds."""
    if now.health is None:
        return Picture(
            address=address, stage="unreachable", detail=now.problem, progress=None, restarts=0, figures=None
        )
    status = now.health["status"]
    return Picture(
        address=address,
        stage="ready" if status == "ok" else status,
        detail=now.health.get("detail") or "",
        progress=now.health.get("progress"),
        restarts=now.health.get("restarts") or 0,
        figures=None if now.samples is None else _figures(now.samples, now, before, wall_time),
        problem=now.problem,
    )


def _figures(samples: Samples, now: Scrape, before: Scrape | None, wall_time: float) -> Figures:
    uptime = max(wall_time - samples.total("llmd:start_time_seconds"), 0.0)
    recent = None
    if before is not None and before.samples is not None and _is_same_run(samples, before.samples):
        recent = _recent(samples, before.samples, now.time - before.time)
    blocks, block_size = (samples.label("vllm:cache_config_info", name) for name in ("num_gpu_blocks", "block_size"))
    ended = samples.by_label("vllm:request_success_total", "finished_reason")
    return Figures(
        version=samples.label("llmd:build_info", "version") or "",
        model=samples.label("vllm:num_requests_running", "model_name") or "",
        uptime=uptime,
        num_servers=len(samples.by_label("process_resident_memory_bytes", "server")) or 1,
        num_unreachable=int(samples.total("llmd:servers_unreachable")),
        running=int(samples.total("vllm:num_requests_running")),
        waiting=int(samples.total("vllm:num_requests_waiting")),
        queue_age=samples.total("llmd:queue_age_seconds"),
        cache_usage=samples.total("vllm:kv_cache_usage_perc"),
        cache_tokens=int(blocks) * int(block_size) if blocks and block_size else None,
        ended={reason: int(ended.get(reason, 0)) for reason in _OUTCOMES},
        refused=int(samples.total("vllm:admission_rejections_total")),
        preempted=int(samples.total("vllm:num_preemptions_total")),
        resumed=int(samples.total("llmd:resumed_requests_total")),
        whole=_recent(samples, Samples({}), uptime),
        recent=recent,
    )


def _is_same_run(now: Samples, before: Samples) -> bool:
    """Counters begin anew with a new `llmd serve`."""
    name = "llmd:start_time_seconds"
    return now.total(name) == before.total(name)


def _recent(now: Samples, before: Samples, seconds: float) -> Recent:
    def grown(name: str) -> float:
        # a sum may fall a little when a server process was killed
        return max(now.total(name) - before.total(name), 0.0)

    def quantiles(name: str) -> Quantiles:
        histogram = since(now.histogram(name), before.histogram(name))
        return Quantiles(quantile(histogram, 0.5), quantile(histogram, 0.95))

    prompt_tokens = grown("vllm:prompt_tokens_total")
    cached_tokens = grown("vllm:prompt_tokens_cached_total")
    return Recent(
        seconds=seconds,
        prompt_tokens=prompt_tokens,
        generation_tokens=grown("vllm:generation_tokens_total"),
        first_token=quantiles("vllm:time_to_first_token_seconds"),
        next_token=quantiles("vllm:inter_token_latency_seconds"),
        prefix_hit_rate=cached_tokens / prompt_tokens if prompt_tokens else None,
    )


def render(picture: Picture) -> list[str]:
    """The picture as lines of text."""
    lines = [_headline(picture)]
    if picture.figures is not None:
        lines += _figure_lines(picture.figures, picture.restarts)
    if picture.problem:
        lines.append(f"  {picture.problem}")
    return lines


def _headline(picture: Picture) -> str:
    model = picture.figures.model if picture.figures is not None else ""
    version = f" · llmd {picture.figures.version}" if picture.figures is not None else ""
    place = f"{model} at {picture.address}" if model else picture.address
    detail = f": {picture.detail}" if picture.detail else ""
    progress = f" {picture.progress:.0%}" if picture.progress is not None else ""
    return f"● {picture.stage}{detail}{progress} · {place}{version}"


def _figure_lines(figures: Figures, restarts: int) -> Iterator[str]:
    yield "  " + " · ".join(_system_facts(figures, restarts))
    yield ""
    longest = f" · longest wait for a first token {_duration(figures.queue_age)}" if figures.queue_age else ""
    yield _line("requests", f"{figures.running:,} running · {figures.waiting:,} waiting{longest}")
    of_tokens = f" of {figures.cache_tokens:,} tokens" if figures.cache_tokens is not None else ""
    yield _line("KV cache", f"{_bar(figures.cache_usage)} {figures.cache_usage:4.0%}{of_tokens}")
    yield ""
    if figures.recent is not None:
        recent = figures.recent
        yield f"  last {recent.seconds:.0f} s"
        rate_in, rate_out = recent.prompt_tokens / recent.seconds, recent.generation_tokens / recent.seconds
        yield _line("tokens/s", f"{_rate(rate_in)} in · {_rate(rate_out)} out")
        yield from _latency_lines(recent)
        yield ""
    yield "  since the start"
    yield _line("tokens", f"{figures.whole.prompt_tokens:,.0f} in · {figures.whole.generation_tokens:,.0f} out")
    if figures.recent is None:
        yield from _latency_lines(figures.whole)
    yield _line("ended", " · ".join(f"{count:,} {reason}" for reason, count in figures.ended.items()))
    yield _line(
        "besides",
        f"{figures.refused:,} refused · {figures.preempted:,} preempted · {figures.resumed:,} resumed",
    )


def _system_facts(figures: Figures, restarts: int) -> Iterator[str]:
    yield f"up {_long_duration(figures.uptime)}"
    yield "1 engine restart" if restarts == 1 else f"{restarts} engine restarts"
    if figures.num_servers > 1:
        yield f"{figures.num_servers} server processes"
    if figures.num_unreachable:
        yield f"{figures.num_unreachable} UNREACHABLE"


def _latency_lines(recent: Recent) -> Iterator[str]:
    for name, quantiles in (("first token", recent.first_token), ("next token", recent.next_token)):
        yield _line(name, _quantiles(quantiles))
    hits = "–" if recent.prefix_hit_rate is None else f"{recent.prefix_hit_rate:.0%} of prompt tokens"
    yield _line("prefix hits", hits)


def _quantiles(quantiles: Quantiles) -> str:
    if quantiles.p50 is None or quantiles.p95 is None:
        return "–"
    return f"{_duration(quantiles.p50)} p50 · {_duration(quantiles.p95)} p95"


def _line(name: str, text: str) -> str:
    return f"  {name:<12} {text}"


def _bar(share: float) -> str:
    filled = round(min(max(share, 0.0), 1.0) * _BAR_WIDTH)
    # never empty while something is in use
    filled = max(filled, int(share > 0))
    return "█" * filled + "░" * (_BAR_WIDTH - filled)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _long_duration(seconds: float) -> str:
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < _HOUR:
        return f"{seconds // _MINUTE:.0f} min {seconds % _MINUTE:.0f} s"
    if seconds < _DAY:
        return f"{seconds // _HOUR:.0f} h {seconds % _HOUR // _MINUTE:.0f} min"
    return f"{seconds // _DAY:.0f} d {seconds % _DAY // _HOUR:.0f} h"
