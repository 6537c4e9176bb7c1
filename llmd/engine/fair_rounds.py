"""Fair sharing between clients: which round of its priority a new sequence belongs to. Pure; knows no blocks, no steps.

A round holds at most one sequence of each client, and rounds are served in order, first come first served within each.
So a client with a thousand waiting sequences is spread over a thousand rounds, and another client's first one goes into
the next of them. A round that has begun takes nobody in any more: what waits has only so many before it, however many
clients come later. This is start-time fair queueing (Goyal, Vin and Cheng, 1996) with every sequence of length 1, but
for the closed round. With one client it is first come, first served.
"""

from bisect import bisect_left
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Level:
    """The open sequences of one priority."""

    begun: int = 0  # the last round of which a sequence has begun
    num_open: int = 0
    waiting: dict[str, list[int]] = field(default_factory=dict)  # client → rounds of what never ran, ascending


class FairRounds:
    """The rounds of every priority, for as long as it has open sequences."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}

    def join(self, client: str, *, priority: int) -> int:
        """A new sequence; returns its round."""
        level = self._levels.setdefault(priority, _Level())
        level.num_open += 1
        rounds = level.waiting.setdefault(client, [])
        # what ran once, and was preempted, is of a round that has begun
        joined = max(level.begun, rounds[-1] if rounds else 0) + 1
        rounds.append(joined)
        return joined

    def begin(self, client: str, *, priority: int, joined: int) -> None:
        """A sequence that had joined this round runs, perhaps not for the first time."""
        level = self._levels[priority]
        level.begun = max(level.begun, joined)
        _wait_no_longer(level, client, joined)

    def end(self, client: str, *, priority: int, joined: int) -> None:
        """A sequence has ended, whether it ever ran or not."""
        level = self._levels[priority]
        level.num_open -= 1
        if level.num_open == 0:
            del self._levels[priority]
        else:
            _wait_no_longer(level, client, joined)


def _wait_no_longer(level: _Level, client: str, joined: int) -> None:
    rounds = level.waiting.get(client, [])
    position = bisect_left(rounds, joined)
    if position == len(rounds) or rounds[position] != joined:
        return  # it has run before
    del rounds[position]
    if not rounds:
        del level.waiting[client]
