"""What a server's /metrics says, as numbers: reading the text, differences, quantiles. Knows no metric by name."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", re.ASCII)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"', re.ASCII)
_ESCAPED = {r"\\": "\\", r"\"": '"', r"\n": "\n"}

Histogram = dict[float, float]  # upper bound → observations up to it


@dataclass(frozen=True, slots=True)
class Samples:
    """One reading of /metrics."""

    values: dict[str, list[tuple[dict[str, str], float]]]  # name → (labels, value)

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name with these labels; 0 if there are none."""
        return sum(value for found, value in self.values.get(name, ()) if labels.items() <= found.items())

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """The samples of that name by one of their labels."""
        sums: dict[str, float] = {}
        for labels, value in self.values.get(name, ()):
            key = labels.get(label, "")
            sums[key] = sums.get(key, 0.0) + value
        return sums

    def label(self, name: str, label: str) -> str | None:
        """What the first sample of that name says in this label."""
        return next((labels.get(label) for labels, _ in self.values.get(name, ())), None)

    def histogram(self, name: str) -> Histogram:
        """Bounds in ascending order; empty if there is no such histogram."""
        by_bound = self.by_label(f"{name}_bucket", "le")
        return dict(sorted((float(bound), count) for bound, count in by_bound.items()))


def parse_samples(text: str) -> Samples:
    """Read Prometheus' text format; lines that are not in it do not count."""
    values: dict[str, list[tuple[dict[str, str], float]]] = {}
    for name, labels, value in _samples(text):
        values.setdefault(name, []).append((labels, value))
    return Samples(values)


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if found is None:
            continue
        name, labels, value = found.groups()
        try:
            number = float(value)
        except ValueError:
            continue
        yield name, {key: _unescaped(text) for key, text in _LABEL.findall(labels or "")}, number


def _unescaped(text: str) -> str:
    return re.sub(r"\\.", lambda found: _ESCAPED.get(found[0], found[0]), text)


def since(now: Histogram, before: Histogram) -> Histogram:
    """What came in between two readings."""
    return {bound: count - before.get(bound, 0.0) for bound, count in now.items()}


def quantile(histogram: Histogram, q: float) -> float | None:
    """The value below which a share `q` of the observations lies; None if there are none.

    As Prometheus' histogram_quantile: within a bucket the observations are taken to be spread evenly, the first bucket
    begins at 0, and what lies in the last, which has no bound, is as large as the largest bound.
    """
    bounds = sorted(histogram)
    if not bounds or histogram[bounds[-1]] <= 0:
        return None
    rank = q * histogram[bounds[-1]]
    for lower, upper in pairwise([0.0, *bounds]):
        below, up_to = histogram.get(lower, 0.0) if lower else 0.0, histogram[upper]
        if up_to >= rank and up_to > below:
            return lower if math.isinf(upper) else lower + (upper - lower) * max(rank - below, 0.0) / (up_to - below)
    return None
