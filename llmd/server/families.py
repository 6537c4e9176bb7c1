"""Metrics as plain data: making, adding and collecting families. Pure; knows no metric by name."""

from collections.abc import Iterable

from llmd.protocol.figures import Family, Sample

Labels = dict[str, str]


def gauge(name: str, help_text: str, labels: Labels, value: float) -> Family:
    return Family(name, "gauge", help_text, [Sample(name, labels, value)])


def counter(name: str, help_text: str, labels: Labels, value: float) -> Family:
    return Family(name, "counter", help_text, [Sample(f"{name}_total", labels, value)])


def added_up(parts: Iterable[list[Family]]) -> list[Family]:
    """One family for each name, each of its samples the sum of those with the same labels."""
    families: dict[str, Family] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for part in parts:
        for family in part:
            families.setdefault(family.name, family)
            samples = sums.setdefault(family.name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                samples[key] = samples.get(key, 0.0) + sample.value
    return [
        Family(
            family.name,
            family.kind,
            family.help,
            [Sample(name, dict(labels), value) for (name, labels), value in sums[family.name].items()],
        )
        for family in families.values()
    ]


def without_gauges(families: list[Family]) -> list[Family]:
    """What a process had counted, without what was only so at one time."""
    return [family for family in families if family.kind != "gauge"]


def merged(parts: Iterable[list[Family]]) -> list[Family]:
    """The same families of several processes, whose samples differ in a label."""
    families: dict[str, Family] = {}
    for part in parts:
        for family in part:
            first = families.setdefault(family.name, Family(family.name, family.kind, family.help, []))
            first.samples.extend(family.samples)
    return list(families.values())
