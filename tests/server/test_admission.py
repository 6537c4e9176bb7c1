"""Who may wait: the bound of the queue, and how clients share it. Pure, so properties rather than examples."""

import math
from collections import Counter
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd.server.admission import Backlog, overloaded, rejection

LIMIT = 64

# (client, sequences, tokens of each); 0 sequences = one of its sequences begins, if it has any
MOVES = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 24), st.integers(1, 9)), max_size=80)


class Queue:
    """A backlog that is asked before anything enters, as the server does."""

    def __init__(self, *, shared: bool, max_num_sequences: int = LIMIT, max_num_tokens: int = 1 << 20) -> None:
        self.backlog = Backlog()
        self.waiting: dict[str, list[int]] = {}  # tokens of each sequence, by client
        self._shared = shared
        self._ask = partial(rejection, self.backlog, max_num_sequences=max_num_sequences, max_num_tokens=max_num_tokens)

    def would_reject(self, client: str, num_sequences: int, num_tokens: int = 1) -> str | None:
        return self._ask(
            num_sequences=num_sequences,
            num_tokens=num_sequences * num_tokens,
            client=client if self._shared else None,
        )

    def submit(self, client: str, num_sequences: int, num_tokens: int = 1) -> bool:
        if self.would_reject(client, num_sequences, num_tokens) is not None:
            return False
        for _ in range(num_sequences):
            self.backlog.enter(num_tokens, client=client)
            self.waiting.setdefault(client, []).append(num_tokens)
        return True

    def begin(self, client: str) -> None:
        if self.waiting.get(client):
            self.backlog.begin(self.waiting[client].pop(0), client=client, now=0.0)

    def num_waiting(self, client: str) -> int:
        return len(self.waiting.get(client, []))

    def move(self, client: str, num_sequences: int, num_tokens: int) -> None:
        if num_sequences:
            self.submit(client, num_sequences, num_tokens)
        else:
            self.begin(client)


@given(MOVES, st.booleans())
def test_the_bound_holds_and_the_books_agree(moves: list[tuple[str, int, int]], shared: bool) -> None:
    queue = Queue(shared=shared, max_num_tokens=200)
    for move in moves:
        before = queue.backlog.num_sequences, queue.backlog.num_tokens
        queue.move(*move)
        counts = {client: len(waiting) for client, waiting in queue.waiting.items() if waiting}
        assert queue.backlog.num_sequences == sum(counts.values())
        assert queue.backlog.num_tokens == sum(map(sum, queue.waiting.values()))
        assert queue.backlog.num_clients == len(counts)
        assert all(queue.backlog.of_client(client).num_sequences == count for client, count in counts.items())
        # where nothing waits, a request that is larger than the bound may
        if before != (0, 0):
            assert queue.backlog.num_sequences <= max(before[0], LIMIT)
            assert queue.backlog.num_tokens <= max(before[1], 200)


@given(MOVES)
def test_whoever_has_nothing_waiting_finds_room(moves: list[tuple[str, int, int]]) -> None:
    """Each client that fills the queue leaves at least half of what it found: log2 of the bound may do so."""
    queue = Queue(shared=True)
    for client, num_sequences, num_tokens in moves:
        queue.move(client, num_sequences, num_tokens)
        if queue.backlog.num_clients <= math.log2(LIMIT) - 1:
            assert queue.would_reject("newcomer", 1) is None


@given(MOVES, st.sampled_from("abcdefgh"), st.integers(1, 24))
def test_who_is_refused_has_or_asks_for_more_than_is_free(
    moves: list[tuple[str, int, int]], client: str, num_sequences: int
) -> None:
    queue = Queue(shared=True)
    for move in moves:
        queue.move(*move)
    total = queue.num_waiting(client) + num_sequences
    num_free = LIMIT - queue.backlog.num_sequences - num_sequences
    refused = queue.would_reject(client, num_sequences) is not None
    assert refused == (total > num_free and queue.backlog.num_sequences > 0)


@pytest.mark.parametrize("num_clients", [1, 2, 3])
def test_clients_that_all_want_more_have_equal_shares(num_clients: int) -> None:
    """Alone one has half; two have a third each, three a quarter, and one share is left for the next."""
    limit = 12 * (num_clients + 1)
    queue = Queue(shared=True, max_num_sequences=limit)
    clients = [f"client {number}" for number in range(num_clients)]
    while sum(queue.submit(client, 1) for client in clients):
        pass
    assert {queue.num_waiting(client) for client in clients} == {12}
    assert queue.would_reject("newcomer", 1) is None


def test_a_client_that_had_it_all_gives_way_as_its_sequences_begin() -> None:
    queue = Queue(shared=True, max_num_sequences=12)
    while queue.submit("greedy", 1):
        pass
    assert queue.num_waiting("greedy") == 6
    begun: Counter[str] = Counter()
    for _ in range(60):
        queue.submit("greedy", 1)
        queue.submit("late", 1)
        # the engine lets keys take turns
        turn = min((client for client in ("greedy", "late") if queue.num_waiting(client)), key=lambda c: begun[c])
        queue.begin(turn)
        begun[turn] += 1
    assert queue.num_waiting("late") >= 3
    assert abs(begun["greedy"] - begun["late"]) <= 1


def test_tokens_are_shared_too() -> None:
    queue = Queue(shared=True, max_num_tokens=100)
    assert queue.submit("greedy", 1, 50)
    assert queue.would_reject("greedy", 1) == "queued_tokens"
    assert queue.would_reject("other", 1, 26) == "queued_tokens"
    assert queue.submit("other", 1, 25)


def test_without_sharing_one_client_may_have_all() -> None:
    queue = Queue(shared=False)
    assert queue.submit("greedy", LIMIT)
    assert queue.would_reject("other", 1) == "queued_reqs"


def test_a_key_is_told_what_it_has_waiting_itself() -> None:
    queue = Queue(shared=True, max_num_sequences=30)
    for second in range(10):
        queue.backlog.enter(7, client="other")
        queue.backlog.begin(7, client="other", now=float(second))
    assert queue.submit("greedy", 10, 7)
    assert queue.submit("other", 4, 7)
    error = overloaded(queue.backlog, "queued_reqs", limit=30, now=10.0, client="greedy")
    assert "14 sequences with 98 prompt tokens wait" in str(error)
    assert "10 sequences with 70 prompt tokens of them have your API key" in str(error)
    # all 14 are before its tenth, and half of them begin in 7 s at one a second
    assert error.retry_after == pytest.approx(7.0)
    assert "half of your key's begin within 7 s" in str(error)
    error = overloaded(queue.backlog, "queued_tokens", limit=30, now=10.0, client="newcomer")
    assert error.retry_after == pytest.approx(1.0)
