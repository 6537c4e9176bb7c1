"""The one part of gpu-check that no rehearsal runs: what it asks of CUDA, with CUDA's answers made up."""

from types import SimpleNamespace
from typing import Any, ClassVar, Self

import pytest
import torch

from bench.gpu.machine import Gpu
from bench.gpu.sizes import WHOLE
from bench.gpu.timing import num_input_sets, time_calls


class Event:
    """A clock that advances by a millisecond at each record."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.now += 1.0
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


class Capture:
    """Runs what is captured, or refuses it."""

    error: Exception | None = None
    streams: ClassVar[list[str]] = []  # that were made current
    ended: ClassVar[list[tuple[int, str]]] = []  # device and memory of captures that the allocator was told to end

    def __init__(self, graph: "Graph", *, pool: str) -> None:
        self.graph = graph

    def __enter__(self) -> Self:
        if Capture.error is not None:
            raise Capture.error
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Graph:
    def replay(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20
    )
    answers: dict[str, Any] = {
        "get_device_properties": lambda device: properties,
        "mem_get_info": lambda device: (70 << 30, 80 << 30),
        "synchronize": lambda device: None,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Capture,
        "_sleep": lambda cycles: None,
        "current_stream": lambda device: "the stream that was current",
        "set_stream": Capture.streams.append,
        "graph_pool_handle": lambda: "memory of a graph",
    }
    for name, answer in answers.items():
        # What is made up must exist.
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *ended: Capture.ended.append(ended))
    monkeypatch.setattr(Capture, "error", None)
    return Gpu()


def test_it_is_described(gpu: Gpu) -> None:
    assert (gpu.name, gpu.arch, gpu.num_processors) == ("NVIDIA H100 80GB HBM3", "sm_90", 132)
    assert gpu.sizes is WHOLE
    assert gpu.describe()["L2 bytes"] == 50 << 20
    with gpu.running():
        gpu.synchronize()


def test_calls_are_captured_and_their_replays_are_timed(gpu: Gpu) -> None:
    calls: list[int] = []
    timing = time_calls(gpu, [lambda: calls.append(0), lambda: calls.append(1)])
    # Once to compile and once to capture; replays call nothing.
    assert calls == [0, 1, 0, 1]
    assert not Capture.ended
    assert (timing.how, timing.seconds) == ("graph", pytest.approx(0.5e-3))


def test_what_cannot_be_captured_is_called_and_says_so(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Capture, "error", RuntimeError("operation not permitted when stream is capturing"))
    calls: list[int] = []
    timing = time_calls(gpu, [lambda: calls.append(0)])
    assert timing.how == "calls"
    assert Capture.streams.pop() == "the stream that was current"
    assert Capture.ended.pop() == (0, "memory of a graph")
    assert len(calls) > 2


@pytest.mark.parametrize(("num_bytes", "expected"), [(1, 64), (4 << 20, 51), (50 << 20, 5), (1 << 30, 2)])
def test_inputs_rotate_over_four_times_the_cache(gpu: Gpu, num_bytes: int, expected: int) -> None:
    assert num_input_sets(gpu, num_bytes) == expected
