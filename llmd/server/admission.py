"""The bounded queue: whether more may wait, and what a client is told that may not. Pure: no clock, no engine.

A sequence waits from its submission to its first token. Only what this server process has submitted counts, so the
bound is exact, and costs no question to the engine.
"""

from collections import deque
from typing import Literal

from llmd.config import SECONDS
from llmd.errors import Overloaded

MAX_RETRY_AFTER = 60 * SECONDS  # openai's client takes a longer one for nonsense
UNKNOWN_RETRY_AFTER = 5 * SECONDS  # where nothing has begun lately
PACE_WINDOW = 30 * SECONDS
_MAX_BEGINNINGS = 512

RejectionReason = Literal["queued_reqs", "queued_tokens"]


class Backlog:
    """What waits, and how fast it has begun lately. Times are in seconds, of any one clock."""

    def __init__(self) -> None:
        self.num_sequences = 0
        self.num_tokens = 0  # of their prompts
        self._begun_at: deque[float] = deque(maxlen=_MAX_BEGINNINGS)

    def enter(self, num_tokens: int) -> None:
        """A sequence with so many prompt tokens waits from now on."""
        self.num_sequences += 1
        self.num_tokens += num_tokens

    def begin(self, num_tokens: int, *, now: float) -> None:
        """One of those that wait has its first token."""
        self.leave(num_tokens)
        self._begun_at.append(now)

    def leave(self, num_tokens: int) -> None:
        """One of those that wait never began: cancelled, or failed."""
        self.num_sequences -= 1
        self.num_tokens -= num_tokens

    def seconds_to_begin(self, num_sequences: int, *, now: float) -> float | None:
        """How long so many take to begin, at the pace of late; None if none has begun."""
        while self._begun_at and self._begun_at[0] < now - PACE_WINDOW:
            self._begun_at.popleft()
        if not self._begun_at:
            return None
        # a burst is no pace: at least a second counts
        return num_sequences * max(now - self._begun_at[0], 1 * SECONDS) / len(self._begun_at)


def rejection(
    backlog: Backlog, *, num_sequences: int, num_tokens: int, max_num_sequences: int, max_num_tokens: int
) -> RejectionReason | None:
    """Which bound a request of so many sequences and prompt tokens would break, if any.

    Where nothing waits every request may, or one that is larger than a bound would be sent away for ever.
    """
    if backlog.num_sequences == 0:
        return None
    if backlog.num_sequences + num_sequences > max_num_sequences:
        return "queued_reqs"
    if backlog.num_tokens + num_tokens > max_num_tokens:
        return "queued_tokens"
    return None


def overloaded(backlog: Backlog, reason: RejectionReason, *, limit: int, now: float) -> Overloaded:
    """What to tell a client that may not wait: how much does, and when to come back: once half of it has begun."""
    seconds = backlog.seconds_to_begin((backlog.num_sequences + 1) // 2, now=now)
    if seconds is None:
        outlook = "None of them has begun lately, so the time it takes is not known."
    else:
        outlook = f"At the pace of late, half of them begin within {max(1, round(seconds))} s."
    return Overloaded(
        f"The queue is full: {backlog.num_sequences} sequences with {backlog.num_tokens} prompt tokens wait for their "
        f"first token, and this request would exceed the limit of {limit} "
        f"{'sequences' if reason == 'queued_reqs' else 'prompt tokens'}. {outlook} Please try again later.",
        retry_after=min(UNKNOWN_RETRY_AFTER if seconds is None else seconds, MAX_RETRY_AFTER),
    )
