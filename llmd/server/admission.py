"""The bounded queue: whether more may wait, and what a client is told that may not. Pure: no clock, no engine.

A sequence waits from its submission to its first token. Only what this server process has submitted counts, so the
bound is exact, and costs no question to the engine.

Where clients share the queue, each may have as much of it as it leaves free: dynamic thresholds (Choudhury and Hahne,
1998, with α = 1). One that is alone gets half, each of two a third, and what it does not use is there for the next.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

from llmd.config import SECONDS
from llmd.errors import Overloaded

MAX_RETRY_AFTER = 60 * SECONDS  # openai's client takes a longer one for nonsense
UNKNOWN_RETRY_AFTER = 5 * SECONDS  # where nothing has begun lately
PACE_WINDOW = 30 * SECONDS
_MAX_BEGINNINGS = 512

RejectionReason = Literal["queued_reqs", "queued_tokens"]


@dataclass(slots=True)
class Waiting:
    """How much waits, of one client or of all."""

    num_sequences: int = 0
    num_tokens: int = 0  # of their prompts


class Backlog:
    """What waits, and how fast it has begun lately. Times are in seconds, of any one clock."""

    def __init__(self) -> None:
        self._all = Waiting()
        self._by_client: dict[str, Waiting] = {}  # only those that have something waiting
        self._begun_at: deque[float] = deque(maxlen=_MAX_BEGINNINGS)

    @property
    def num_sequences(self) -> int:
        return self._all.num_sequences

    @property
    def num_tokens(self) -> int:
        return self._all.num_tokens

    @property
    def num_clients(self) -> int:
        return len(self._by_client)

    def of_client(self, client: str) -> Waiting:
        return self._by_client.get(client) or Waiting()

    def enter(self, num_tokens: int, *, client: str) -> None:
        """A sequence with so many prompt tokens waits from now on."""
        for waiting in (self._all, self._by_client.setdefault(client, Waiting())):
            waiting.num_sequences += 1
            waiting.num_tokens += num_tokens

    def begin(self, num_tokens: int, *, client: str, now: float) -> None:
        """One of those that wait has its first token."""
        self.leave(num_tokens, client=client)
        self._begun_at.append(now)

    def leave(self, num_tokens: int, *, client: str) -> None:
        """One of those that wait never began: cancelled, or failed."""
        own = self._by_client[client]
        for waiting in (self._all, own):
            waiting.num_sequences -= 1
            waiting.num_tokens -= num_tokens
        if own.num_sequences == 0:
            del self._by_client[client]

    def seconds_to_begin(self, num_sequences: int, *, now: float) -> float | None:
        """How long so many take to begin, at the pace of late; None if none has begun."""
        while self._begun_at and self._begun_at[0] < now - PACE_WINDOW:
            self._begun_at.popleft()
        if not self._begun_at:
            return None
        # a burst is no pace: at least a second counts
        return num_sequences * max(now - self._begun_at[0], 1 * SECONDS) / len(self._begun_at)


def rejection(
    backlog: Backlog,
    *,
    num_sequences: int,
    num_tokens: int,
    max_num_sequences: int,
    max_num_tokens: int,
    client: str | None = None,
) -> RejectionReason | None:
    """Which bound a request of so many sequences and prompt tokens would break, if any.

    `client`: who must leave room for others; None where everyone has all of the queue. Where nothing waits every
    request may, or one that is larger than a bound would be sent away for ever.
    """
    if backlog.num_sequences == 0:
        return None
    # what must be free beside this request
    reserve = Waiting()
    if client is not None:
        own = backlog.of_client(client)
        reserve = Waiting(own.num_sequences + num_sequences, own.num_tokens + num_tokens)
    if backlog.num_sequences + num_sequences + reserve.num_sequences > max_num_sequences:
        return "queued_reqs"
    if backlog.num_tokens + num_tokens + reserve.num_tokens > max_num_tokens:
        return "queued_tokens"
    return None


def overloaded(
    backlog: Backlog, reason: RejectionReason, *, limit: int, now: float, client: str | None = None
) -> Overloaded:
    """What to tell a client that may not wait: how much does, and when to come back: once half of it has begun."""
    unit = "sequences" if reason == "queued_reqs" else "prompt tokens"
    if client is None:
        num_ahead, whose = backlog.num_sequences, "of them"
        bound = f"this request would exceed the limit of {limit} {unit}"
    else:
        own = backlog.of_client(client)
        # keys take turns
        num_ahead, whose = min(backlog.num_sequences, max(1, own.num_sequences) * backlog.num_clients), "of your key's"
        bound = (
            f"{own.num_sequences} sequences with {own.num_tokens} prompt tokens of them have your API key. A key may "
            f"have as many {unit} waiting as it leaves free of the limit of {limit}, and this request would exceed that"
        )
    seconds = backlog.seconds_to_begin((num_ahead + 1) // 2, now=now)
    if seconds is None:
        outlook = "None of them has begun lately, so the time it takes is not known."
    else:
        outlook = f"At the present pace, half {whose} begin within {max(1, round(seconds))} s."
    return Overloaded(
        f"The queue is full: {backlog.num_sequences} sequences with {backlog.num_tokens} prompt tokens wait for their "
        f"first token, and {bound}. {outlook} Please try again later.",
        retry_after=min(UNKNOWN_RETRY_AFTER if seconds is None else seconds, MAX_RETRY_AFTER),
    )
