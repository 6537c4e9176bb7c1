"""What the rank's loop asks of whatever runs its plans. Knows no device and no model."""

from dataclasses import dataclass
from typing import Protocol

from llmd.protocol.steps import StepPlan, StepResult

# The next step waits on the device while one runs; more would only make the answers older.
MAX_STEPS_IN_FLIGHT = 2


class PendingStep(Protocol):
    """A step that was launched."""

    def result(self) -> StepResult:
        """Wait until the step is done. Any thread may wait, once. Raises what went wrong on the device."""


@dataclass(frozen=True, slots=True)
class DoneStep:
    """A PendingStep that nobody has to wait for."""

    done: StepResult

    def result(self) -> StepResult:
        return self.done


class Runner(Protocol):
    """Runs plans in the order given. At most MAX_STEPS_IN_FLIGHT are launched and not yet waited for."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Begin a step. A device of its own works on it while the host goes on."""

    def prepare(self) -> bool:
        """Do a little, while there is nothing to run, that makes later steps faster. False: there is nothing to do."""
