"""The recorder finds what would go wrong in a CUDA graph."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.proof.interpreter import interpreted
from tests.worker.recorder import HostSync, no_waiting, record


@triton.jit
def add_kernel(x, y, number, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(y + places, tl.load(x + places) + number)


def test_a_replay_reads_what_memory_holds_then() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.zeros(2)
    graph = record(lambda: y.copy_(torch.relu(x * 2)))
    # capturing runs nothing
    assert y.tolist() == [0, 0]
    x.copy_(torch.tensor([5.0, -5.0]))
    graph.replay()
    assert y.tolist() == [10, 0]


def test_kernels_are_replayed_too() -> None:
    x, y = torch.ones(4), torch.zeros(4)
    with interpreted():
        graph = record(lambda: add_kernel[(1,)](x, y, 3.0, BLOCK=4))
        assert y.tolist() == [0] * 4
        x.fill_(2)
        graph.replay()
    assert y.tolist() == [5] * 4


def test_a_number_of_the_host_stays_as_it_was() -> None:
    lens, y = [1], torch.zeros(1)

    def work() -> None:
        y.copy_(torch.full((1,), float(lens[0])))

    graph = record(work)
    lens[0] = 2
    graph.replay()
    assert y.tolist() == [1]


def test_what_a_graph_allocates_is_lost_after_it() -> None:
    x = torch.ones(2)
    results: list[Tensor] = []
    graph = record(lambda: results.append(x + 1))
    graph.replay()
    assert results[0].isnan().all()


def test_conversions_and_views_are_done_anew() -> None:
    x, y = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    with torch.inference_mode():
        graph = record(lambda: y.copy_(x.t().long().flatten()))
        x += 1
        graph.replay()
        x += 1
        graph.replay()
    assert y.tolist() == [3, 5, 4, 6]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
    ],
)
def test_waiting_is_an_error(wait: object) -> None:
    with no_waiting(), pytest.raises(HostSync):
        wait(torch.ones(2))  # type: ignore[operator]
