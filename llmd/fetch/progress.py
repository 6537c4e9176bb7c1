"""How work that takes long says how far it is. Knows nothing of who listens."""

from collections.abc import Callable

# (what is being done, for people; share that is done, 0 … 1, None = unknown)
Progress = Callable[[str, float | None], None]


def ignore_progress(detail: str, fraction: float | None) -> None:
    """Nobody listens."""


def part_of(progress: Progress, start: float, end: float) -> Progress:
    """The progress of a part that takes the whole from `start` to `end` (shares, 0 … 1)."""

    def report(detail: str, fraction: float | None) -> None:
        progress(detail, None if fraction is None else start + (end - start) * fraction)

    return report
