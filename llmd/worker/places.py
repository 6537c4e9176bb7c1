"""What the host knows of sequences whose tokens and block tables live on the device: where, and how they are drawn.

Tokens that were drawn are known to the device alone, so nothing here depends on the result of a step. No tensors.
"""

from dataclasses import dataclass

from llmd.protocol.steps import NewSequence, SequenceStep, StepPlan
from llmd.worker.sequences import row_sampling
from llmd_kernels import BLOCK_TABLES, TOKEN_IDS, NewEntries, RowRecord, record_of


@dataclass(slots=True, eq=False)
class PlacedSequence:
    """One live sequence."""

    place: int  # its row of the tables on the device
    num_prompt_tokens: int
    record: RowRecord  # how its tokens are drawn
    num_logprobs: int | None
    num_prompt_logprobs: int | None
    prompt: list[int]  # only where the probabilities of its tokens are wanted
    num_blocks: int = 0  # of its block table


# A sequence's part of a step.
Row = tuple[SequenceStep, PlacedSequence]


class Places:
    """The live sequences, at most `num_places`."""

    def __init__(self, num_places: int) -> None:
        self._free = list(range(num_places))
        self._by_id: dict[int, PlacedSequence] = {}

    def take_in(self, plan: StepPlan) -> tuple[list[Row], list[NewEntries]]:
        """Forget what the plan drops, give places to what it brings → its rows, and what is new in the tables.

        A place may go to another sequence while steps of the last one are in flight: the device does all in order.
        """
        for sequence_id in plan.dropped:
            self._free.append(self._by_id.pop(sequence_id).place)
        new_entries = []
        for new in plan.new:
            sequence = self._by_id[new.sequence_id] = self._placed(new)
            new_entries.append(NewEntries(TOKEN_IDS, sequence.place, 0, new.token_ids))
        rows = [(step, self._by_id[step.sequence_id]) for step in plan.sequences]
        for step, sequence in rows:
            if step.new_block_ids:
                new_entries.append(NewEntries(BLOCK_TABLES, sequence.place, sequence.num_blocks, step.new_block_ids))
                sequence.num_blocks += len(step.new_block_ids)
        return rows, new_entries

    def _placed(self, new: NewSequence) -> PlacedSequence:
        num_prompt_logprobs = new.sampling.num_prompt_logprobs
        return PlacedSequence(
            place=self._free.pop(),
            num_prompt_tokens=new.num_prompt_tokens,
            record=record_of(row_sampling(new.sampling)),
            num_logprobs=new.sampling.num_logprobs,
            num_prompt_logprobs=num_prompt_logprobs,
            prompt=[] if num_prompt_logprobs is None else new.token_ids[: new.num_prompt_tokens],
        )


def output_position(row: Row) -> int:
    """Which output token the row draws, from 0."""
    step, sequence = row
    return step.start + step.num_tokens - sequence.num_prompt_tokens


def wanted_prompt_ids(row: Row) -> list[int]:
    """The prompt tokens whose probabilities the logits of the row's first tokens tell; most want none."""
    step, sequence = row
    # the logits of a token tell the probability of the one after it
    return sequence.prompt[step.start + 1 : step.start + step.num_tokens + 1]


def draws_plainly(row: Row) -> bool:
    """Whether the token depends on nothing but logits, temperature and noise, and nothing is said of it but its id."""
    record = row[1].record
    biases, _ = record.early_biases if output_position(row) < record.min_tokens else record.biases
    return row[1].num_logprobs is None and not record.filters and not record.penalizes and len(biases) == 0
