"""Whether a sequence may be what kills engines, judged by when they died. Pure; knows neither sockets nor events.

Every sequence that an engine runs when it dies is a suspect, and whoever is given a token is cleared. A sequence with
which two engines died runs alone from then on: so the innocent are cleared one by one, and if an engine dies of it even
so, it is given up.

Engines also die of something else (`kill -9`), perhaps many times in a row. Therefore nobody is given up unless one of
its engines died before it had given a token to anybody of this server: who kills engines after some progress convicts
no request. What does kill engines gets there in the end. It is handed to the next engine before all others and runs
alone, so its death is the first thing that happens there.

What other servers' sequences got does not count: they would keep a request that kills from being given up.
"""

from dataclasses import dataclass

MAX_DEATHS_IN_COMPANY = 2
# whatever the reason: a sequence that so many engines could not finish holds up all others
MAX_ENGINES = 50


@dataclass(slots=True)
class Suspicion:
    """What speaks against one sequence."""

    num_engines: int = 0  # that were given the sequence
    num_deaths: int = 0  # of engines that ran it, since its last token
    has_evidence: bool = False  # one of them had given no token to anybody of this server
    # the engine of now has begun to run it; that it was preempted since is not known here
    is_running: bool = False

    @property
    def must_be_alone(self) -> bool:
        return self.num_deaths >= MAX_DEATHS_IN_COMPANY

    def note_submitted(self) -> None:
        """A new engine is given the sequence."""
        self.num_engines += 1
        self.is_running = False

    def note_started(self) -> None:
        """The engine begins to run it."""
        self.is_running = True

    def note_token(self) -> None:
        """The engine has given it a token and lives."""
        self.num_deaths = 0
        self.has_evidence = False

    def note_death(self, *, had_progress: bool) -> None:
        """The engine is lost. `had_progress`: it had given somebody of this server a token."""
        if self.is_running:
            self.is_running = False
            self.num_deaths += 1
            self.has_evidence |= not had_progress

    def verdict(self) -> str | None:
        """Why the sequence is not given to one more engine; None if it is."""
        if self.num_deaths > MAX_DEATHS_IN_COMPANY and self.has_evidence:
            return (
                f"The engine died {self.num_deaths} times while it worked on this request, the last time on this "
                "request alone, so it is not tried again."
            )
        if self.num_engines >= MAX_ENGINES:
            return f"The engine died {self.num_engines} times before this request ended, so it is not tried again."
        return None
