"""Clients take turns: how many of another's sequences may begin before one's own first, whatever comes in between."""

from collections import Counter
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.fair_rounds import FairRounds
from llmd.protocol.generation import GenerateRequest, SamplingParams
from tests.engine.drive import Drive


@dataclass(frozen=True)
class Waiting:
    """One sequence in the queue, in the order in which the scheduler takes them."""

    client: str
    joined: int
    arrival: int

    @property
    def order(self) -> tuple[int, int]:
        return (self.joined, self.arrival)


class Queue:
    """Serves one sequence at a time in order, and notes who began."""

    def __init__(self) -> None:
        self.rounds = FairRounds()
        self.waiting: list[Waiting] = []
        self.begun: list[Waiting] = []
        self.num_arrivals = 0

    def arrive(self, client: str) -> Waiting:
        new = Waiting(client, self.rounds.join(client, priority=0), self.num_arrivals)
        self.num_arrivals += 1
        self.waiting.append(new)
        return new

    def serve(self) -> None:
        if self.waiting:
            first = min(self.waiting, key=lambda waiting: waiting.order)
            self.waiting.remove(first)
            self.rounds.begin(first.client, priority=0, joined=first.joined)
            self.begun.append(first)

    def cancel(self, position: int) -> None:
        if self.waiting:
            gone = self.waiting.pop(position % len(self.waiting))
            self.rounds.end(gone.client, priority=0, joined=gone.joined)


actions = st.lists(st.one_of(st.sampled_from("AAABCs"), st.integers(0, 50)), max_size=120)


def act(queue: Queue, action: str | int) -> None:
    if isinstance(action, int):
        queue.cancel(action)
    elif action == "s":
        queue.serve()
    else:
        queue.arrive(action)


@settings(deadline=None)
@given(before=actions, after=actions)
def test_a_first_request_waits_for_two_of_each_other_client_at_most(
    before: list[str | int], after: list[str | int]
) -> None:
    queue = Queue()
    queue.arrive("A")  # open to the end, so that nothing is forgotten for lack of requests
    queue.serve()
    for action in before:
        act(queue, action)
    num_begun = len(queue.begun)
    mine = queue.arrive("mine")
    for action in after:
        act(queue, action)
    if mine not in queue.waiting and mine not in queue.begun:
        return  # cancelled
    while mine in queue.waiting:
        queue.serve()
    earlier = queue.begun[num_begun : queue.begun.index(mine)]
    assert all(other.arrival < mine.arrival for other in earlier), "a later arrival went first"
    assert all(count <= 2 for count in Counter(other.client for other in earlier).values())


@settings(deadline=None)
@given(actions=actions)
def test_within_a_client_it_is_first_come_first_served(actions: list[str | int]) -> None:
    queue = Queue()
    for action in actions:
        act(queue, action)
    while queue.waiting:
        queue.serve()
    for client in "ABC":
        arrivals = [begun.arrival for begun in queue.begun if begun.client == client]
        assert arrivals == sorted(arrivals)


@settings(deadline=None)
@given(actions=st.lists(st.one_of(st.sampled_from("AAs"), st.integers(0, 50)), max_size=120))
def test_with_one_client_arrival_alone_counts(actions: list[str | int]) -> None:
    queue = Queue()
    for action in actions:
        act(queue, action)
        by_arrival = sorted(queue.waiting, key=lambda waiting: waiting.arrival)
        assert sorted(queue.waiting, key=lambda waiting: waiting.order) == by_arrival


def test_new_clients_without_end_do_not_starve_an_old_one() -> None:
    queue = Queue()
    old = [queue.arrive("old") for _ in range(5)]
    for number in range(20):
        queue.arrive(f"new {number}")
        queue.arrive(f"newer {number}")
        queue.serve()
        queue.serve()
    assert set(old) <= set(queue.begun)


def test_what_was_cancelled_costs_its_client_nothing() -> None:
    queue = Queue()
    queue.arrive("A")
    for _ in range(100):
        queue.arrive("A")
    for _ in range(100):
        queue.cancel(1)
    queue.arrive("B")
    mine = queue.arrive("A")
    queue.arrive("B")
    queue.arrive("B")
    for _ in range(3):
        queue.serve()
    assert mine in queue.begun


def test_a_priority_without_requests_is_forgotten() -> None:
    rounds = FairRounds()
    first = rounds.join("A", priority=7)
    second = rounds.join("A", priority=7)
    assert (first, second) == (1, 2)
    rounds.begin("A", priority=7, joined=first)
    rounds.end("A", priority=7, joined=first)
    rounds.end("A", priority=7, joined=second)
    assert rounds.join("A", priority=7) == 1


def request(length: int, *, client: str, priority: int = 0) -> GenerateRequest:
    return GenerateRequest(
        request_id=0,
        prompt_token_ids=[length % 5] * length,
        sampling=SamplingParams(max_tokens=2, seed=0),
        client=client,
        priority=priority,
    )


@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_the_scheduler_lets_a_second_client_in_between(max_num_seqs: int) -> None:
    drive = Drive(
        CacheConfig(block_size=4, prefix_caching=False),
        SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=64),
        num_blocks=100,
    )
    many = [drive.add(request(5, client="A")) for _ in range(40)]
    drive.step()
    mine = drive.add(request(6, client="B"))
    many += [drive.add(request(5, client="A")) for _ in range(40)]
    while mine in drive.open:
        drive.step()
    # those that ran already, two that may go first, and who began beside it
    assert sum(key not in drive.open for key in many) <= 2 * max_num_seqs + 2
    drive.finish()


def test_a_backlog_of_one_priority_does_not_count_in_another() -> None:
    drive = Drive(
        CacheConfig(block_size=4, prefix_caching=False),
        SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, policy="priority"),
        num_blocks=100,
    )
    low = [drive.add(request(5, client="A", priority=1)) for _ in range(10)]
    mine = drive.add(request(6, client="A", priority=0))
    others = [drive.add(request(6, client="B", priority=0)) for _ in range(3)]
    while mine in drive.open:
        drive.step()
    assert all(key in drive.open for key in [*low, *others])
    drive.finish()


def test_clients_on_a_pool_that_is_too_small_are_preempted_and_all_end() -> None:
    drive = Drive(
        CacheConfig(block_size=1, prefix_caching=False),
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16),
        num_blocks=24,
    )
    for number in range(12):
        long = request(6, client="ABC"[number % 3])
        drive.add(
            GenerateRequest(
                request_id=0,
                prompt_token_ids=long.prompt_token_ids,
                client=long.client,
                sampling=SamplingParams(max_tokens=18, seed=0),
            )
        )
    drive.finish()
    assert drive.statistics.num_preemptions > 5
