"""Counters of engines that come and go, added up. Pure; knows neither the socket nor Prometheus."""

from itertools import zip_longest

import msgspec

from llmd.protocol.figures import EngineHistory
from llmd.protocol.generation import EngineStatistics

_COUNTERS = (
    "num_steps",
    "num_prompt_tokens",
    "num_output_tokens",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "step_tokens_sum",
)


def heard(history: EngineHistory, statistics: EngineStatistics) -> EngineHistory:
    """The history after one more report. An engine that has made fewer steps than the last report said is a new one."""
    latest, ended = history.latest, history.ended
    if latest is not None and statistics.num_steps < latest.num_steps:
        ended = latest if ended is None else _with_counters_of(ended, latest)
    return EngineHistory(ended=ended, latest=statistics)


def totals(history: EngineHistory) -> EngineStatistics | None:
    """The latest state, with the counters of all engines; None before the first report."""
    if history.latest is None or history.ended is None:
        return history.latest
    return _with_counters_of(history.ended, history.latest)


def _with_counters_of(other: EngineStatistics, statistics: EngineStatistics) -> EngineStatistics:
    sums = {name: getattr(other, name) + getattr(statistics, name) for name in _COUNTERS}
    step_tokens = [sum(counts) for counts in zip_longest(other.step_tokens, statistics.step_tokens, fillvalue=0)]
    return msgspec.structs.replace(statistics, step_tokens=step_tokens, **sums)
