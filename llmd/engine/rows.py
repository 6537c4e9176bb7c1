"""The rows of a step while it is planned, and the sequences that they run. Knows no queues and no block pool."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from llmd.engine.sequence import Sequence
from llmd.protocol.steps import NewSequence, StepPlan, StepResult

_sequence_id = attrgetter("sequence_id")


class PlannedStep(NamedTuple):
    """A step in flight."""

    plan: StepPlan
    sequences: list[Sequence]  # of its rows; any may have stopped since, and run again under another id

    def rows(self, result: StepResult) -> Iterator[tuple[Sequence, int, int, int, int | None]]:
        """(sequence, its id then, start, number of tokens, drawn token) of each row.

        Raises ValueError if the result is not this step's.
        """
        plan, token_ids = self.plan, result.token_ids
        if result.step_id != plan.step_id:
            raise ValueError(f"expected the result of step {plan.step_id}, not of step {result.step_id}")
        if len(token_ids) != sum(plan.samples):
            raise ValueError(f"step {plan.step_id} drew {len(token_ids)} tokens, not {sum(plan.samples)}")
        drawn: Iterable[int | None] = token_ids
        if len(token_ids) < len(plan.samples):
            following = iter(token_ids)
            drawn = [next(following) if samples else None for samples in plan.samples]
        return zip(self.sequences, plan.sequence_ids, plan.starts, plan.num_tokens, drawn, strict=True)


@dataclass(slots=True)
class Rows:
    """The columns of a `StepPlan`, and the sequence of each row."""

    sequences: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    new_block_ids: dict[int, list[int]] = field(default_factory=dict)

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """So many tokens of it run next."""
        start = sequence.num_planned
        sequence.num_planned = start + num_tokens
        self.sequences.append(sequence)
        self.starts.append(start)
        self.num_tokens.append(num_tokens)
        # there is no token yet that could come after these
        self.samples.append(sequence.num_planned >= sequence.num_known and sequence.max_output_tokens > 0)

    def to_step(self, step_id: int, *, dropped: list[int], new: list[NewSequence]) -> PlannedStep:
        plan = StepPlan(
            step_id=step_id,
            dropped=dropped,
            new=new,
            new_block_ids=self.new_block_ids,
            sequence_ids=list(map(_sequence_id, self.sequences)),
            starts=self.starts,
            num_tokens=self.num_tokens,
            samples=self.samples,
        )
        return PlannedStep(plan, self.sequences)
