"""The soak of `bench/soak.py` in short: all its parts work together, and what it reports is true."""

import asyncio
from pathlib import Path

import pytest
from soaking.chaos import schedule
from soaking.run import Settings, soak

pytestmark = pytest.mark.slow


def test_a_short_soak(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = Settings(
        seconds=10,
        output=tmp_path,
        concurrency=12,
        num_tokens=24,
        kinds=("kill both", "kill server", "storm", "nonsense", "overload"),
        server_flags=[
            "--model",
            str(tiny_model_dir),
            "--threads",
            "1",
            "--api-server-count",
            "2",
            "--max-num-queued-reqs",
            "24",
        ],
    )
    report = asyncio.run(soak(settings))

    assert report.failures() == []
    assert report.num_compared > 20
    assert report.restarts == report.chaos["kill both"]
    assert sum(report.chaos.values()) >= 2
    assert report.num_drained == 12
    for name, value in (("answers lost", "0"), ("answers different", "0"), ("KV blocks not home", "0")):
        assert f"{name} {value}" in " ".join(report.table().split())


def test_the_seed_fixes_what_happens() -> None:
    def beginning(seed: str) -> list[tuple[float, str, float]]:
        events = schedule(seed, ["storm", "kill worker", "kill engine"])
        return [(gap, kind, random.random()) for gap, kind, random in (next(events) for _ in range(9))]

    assert beginning("1") == beginning("1")
    assert beginning("1") != beginning("2")
    assert {kind for _, kind, _ in beginning("1")[:3]} == {"storm", "kill worker", "kill engine"}
