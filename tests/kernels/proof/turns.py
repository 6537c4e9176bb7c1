"""Programs that wait for one another: each runs in a thread, one at a time, and gives its turn away where it asks.

Knows nothing of Triton.
"""

import random
import threading
from collections.abc import Callable, Sequence

# So often may every program have its turn before they are taken to wait for one another forever.
MAX_ROUNDS = 100

Program = Callable[[Callable[[], None]], None]


class Deadlock(Exception):
    """No program gets on."""


class _Stopped(BaseException):
    """Raised inside of a program that must not go on."""


def run_in_turns(programs: Sequence[Program], seed: int | None = None) -> None:
    """Run each `program(give_turn)` to its end, in that order, again and again. Raises what the first one raises.

    With a seed half of the programs, others in each round, miss their turn, so that some fall behind.
    """
    generator = None if seed is None else random.Random(seed)
    runs = [_Run(program) for program in programs]
    try:
        for _ in range(MAX_ROUNDS):
            for run in runs:
                if generator is None or generator.random() < 0.5:
                    run.take_turn()
            if all(run.has_ended for run in runs):
                return
        raise Deadlock(f"{sum(not run.has_ended for run in runs)} programs wait for one another")
    finally:
        for run in runs:
            run.stop()


class _Run:
    """One program in its thread, which runs only inside of `take_turn`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.has_ended = False
        self.must_stop = False
        self.failure: BaseException | None = None
        self.turn, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._live, daemon=True)
        self.thread.start()

    def take_turn(self) -> None:
        if self.has_ended:
            return
        self.turn.release()
        self.back.acquire()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """End the thread, wherever the program is."""
        self.must_stop = True
        self.turn.release()
        self.thread.join()

    def _live(self) -> None:
        try:
            self._wait_for_turn()
            self.program(self._give_turn)
        except _Stopped:
            pass
        except BaseException as failure:  # whatever it is, take_turn raises it
            self.failure = failure
        self.has_ended = True
        self.back.release()

    def _give_turn(self) -> None:
        self.back.release()
        self._wait_for_turn()

    def _wait_for_turn(self) -> None:
        self.turn.acquire()
        if self.must_stop:
            raise _Stopped
