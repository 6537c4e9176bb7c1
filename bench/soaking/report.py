"""What came of a soak: counters, what they must be, and the table that people read. Pure."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from soaking.server import Holdings

# A process that has run for a while holds more than at its start: allocators keep pages, caches fill. A leak of a
# kilobyte a request passes this within minutes of load.
MAX_RSS_GROWTH = 64 << 20  # bytes
# the pool for blocking calls keeps idle threads for a few seconds
MAX_THREAD_GROWTH = 2

Held = dict[str, list[Holdings]]
End = Literal["kill", "hang"]


@dataclass(slots=True)
class Report:
    """Filled while the soak runs. Times in seconds."""

    seed: int
    duration: float = 0.0
    num_questions: int = 0

    # clients that want answers
    num_requests: int = 0
    num_compared: int = 0
    lost: list[str] = field(default_factory=list)  # accepted, and no answer: one line each
    different: list[str] = field(default_factory=list)  # where it is written down
    num_deadlines: int = 0  # ended by the client's own deadline, with 408 or a beginning of the answer
    num_left: int = 0  # the client went before the end
    num_cut: int = 0  # its server process was killed
    num_never_admitted: int = 0  # 429 or 503 until the soak was over
    refusals: Counter[int] = field(default_factory=Counter)  # status → how many
    num_without_retry_after: int = 0
    longest_pause: float = 0.0
    troublemakers: Counter[str] = field(default_factory=Counter)  # kind → connections
    answers_to_nonsense: Counter[int] = field(default_factory=Counter)

    # what befell the processes
    chaos: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    # from a death, or the beginning of a hang, to the next token that any client got
    recoveries: dict[End, list[float]] = field(default_factory=lambda: {"kill": [], "hang": []})
    slowest_health: float = 0.0
    num_unreachable: int = 0  # times /health could not be asked

    # the end
    broken_off: list[str] = field(default_factory=list)  # why, if it was
    held_before: Held = field(default_factory=dict)
    held_after: Held = field(default_factory=dict)
    num_blocks_away: float = 0.0
    num_open: float = 0.0  # sequences that the idle engine still had
    num_drained: int = 0  # answers that were under way at SIGTERM, and came
    exit_status: int | None = None
    files_left: list[str] = field(default_factory=list)
    processes_left: list[int] = field(default_factory=list)

    def failures(self) -> list[str]:
        """Every promise that was broken, in words; empty if none was."""
        return [line for line in self._failures() if line]

    def _failures(self) -> Iterator[str]:
        yield from (f"broken off: {line}" for line in self.broken_off)
        yield from (f"lost: {line}" for line in self.lost)
        yield from (f"different: {line}" for line in self.different)
        if self.num_compared == 0:
            yield "no answer was compared"
        if self.num_without_retry_after:
            yield f"{self.num_without_retry_after} refusals did not say when to come again"
        if self.num_unreachable:
            yield f"/health could not be reached {self.num_unreachable} times"
        if self.answers_to_nonsense[500]:
            yield f"nonsense was answered with 500 {self.answers_to_nonsense[500]} times"
        yield from self._leaks()
        if self.exit_status != 0:
            yield f"the exit status is {self.exit_status}"
        if self.files_left:
            yield f"files are left: {', '.join(self.files_left)}"
        if self.processes_left:
            yield f"processes are left: {self.processes_left}"

    def _leaks(self) -> Iterator[str]:
        if self.num_blocks_away:
            yield f"{self.num_blocks_away:g} KV blocks are not home"
        if self.num_open:
            yield f"{self.num_open:g} sequences are open with nobody there"
        yield from growth(self.held_before, self.held_after)

    def table(self) -> str:
        """Two columns of text."""
        rows = list(self._rows())
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "duration, seed", f"{self.duration:.0f} s, {self.seed}"
        yield "requests", f"{self.num_requests} of {self.num_questions} kinds"
        yield "answers compared", str(self.num_compared)
        yield "answers lost", str(len(self.lost))
        yield "answers different", str(len(self.different))
        yield "ended by the client", f"{self.num_left} left, {self.num_deadlines} by their deadline"
        yield "cut with their server process", str(self.num_cut)
        yield "refused (HTTP status)", f"{_counts(self.refusals)}; never admitted: {self.num_never_admitted}"
        yield "other clients", _counts(self.troublemakers)
        yield "answers to nonsense", _counts(self.answers_to_nonsense)
        yield "chaos", _counts(self.chaos)
        yield "engine restarts", str(self.restarts)
        for end, times in self.recoveries.items():
            if times:
                yield f"{end} → next token", f"p50 {median(times):.1f} s, max {max(times):.1f} s, {len(times)} measured"
        yield "longest pause of a stream", f"{self.longest_pause:.1f} s"
        yield "slowest /health", f"{self.slowest_health:.2f} s; unreachable: {self.num_unreachable}"
        for role, before, after in _peaks(self.held_before, self.held_after):
            yield f"{role}: fds", f"{before.num_fds} → {after.num_fds}"
            yield f"{role}: threads", f"{before.num_threads} → {after.num_threads}"
            yield f"{role}: memory", f"{before.rss / 2**20:.0f} → {after.rss / 2**20:.0f} MiB"
        yield "KV blocks not home", f"{self.num_blocks_away:g}"
        yield "sequences still open", f"{self.num_open:g}"
        yield "drain", f"{self.num_drained} answers finished; exit status {self.exit_status}"
        yield "left behind", f"{len(self.files_left)} files, {len(self.processes_left)} processes"


def growth(before: Held, after: Held) -> Iterator[str]:
    """Which process holds more than it may, in words."""
    for role, early, late in _peaks(before, after):
        if late.num_fds > early.num_fds:
            yield f"{role}: {early.num_fds} file descriptors became {late.num_fds}"
        if late.num_threads > early.num_threads + MAX_THREAD_GROWTH:
            yield f"{role}: {early.num_threads} threads became {late.num_threads}"
        if late.rss > early.rss + MAX_RSS_GROWTH:
            yield f"{role}: {early.rss >> 20} MiB became {late.rss >> 20} MiB"


def _peaks(before: Held, after: Held) -> Iterator[tuple[str, Holdings, Holdings]]:
    """Role → the most that one of its processes held before and after: they may have been replaced."""
    for role, holdings in before.items():
        yield role, _most(holdings), _most(after.get(role, []))


def _most(holdings: list[Holdings]) -> Holdings:
    return Holdings(
        num_fds=max((held.num_fds for held in holdings), default=0),
        num_threads=max((held.num_threads for held in holdings), default=0),
        rss=max((held.rss for held in holdings), default=0),
    )


def _counts(counter: Counter[int] | Counter[str]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in sorted(counter.items(), key=str)) or "none"
