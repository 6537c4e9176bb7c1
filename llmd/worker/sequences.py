"""This rank's copies of the live sequences, kept up to date from the differences that plans carry. No tensors."""

from dataclasses import dataclass, field

from llmd.protocol.generation import SamplingParams
from llmd.protocol.steps import NewSequence, SequenceStep, StepPlan
from llmd_kernels import RowSampling


@dataclass(slots=True, eq=False)
class SequenceCopy:
    """One sequence as the rank needs it. The rank itself appends what it draws."""

    token_ids: list[int]  # prompt and output so far
    num_prompt_tokens: int
    sampling: RowSampling
    num_prompt_logprobs: int | None
    block_ids: list[int] = field(default_factory=list)


class Sequences:
    """The copies by sequence id."""

    def __init__(self) -> None:
        self._by_id: dict[int, SequenceCopy] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def take_in(self, plan: StepPlan) -> list[tuple[SequenceStep, SequenceCopy]]:
        """Forget what the plan drops, learn what it brings, grow block tables; returns its rows with their copies."""
        for sequence_id in plan.dropped:
            del self._by_id[sequence_id]
        for new in plan.new:
            self._by_id[new.sequence_id] = _copy(new)
        for sequence_id, block_ids in plan.new_block_ids.items():
            self._by_id[sequence_id].block_ids += block_ids
        return [(row, self._by_id[row.sequence_id]) for row in plan.rows()]


def _copy(new: NewSequence) -> SequenceCopy:
    return SequenceCopy(
        token_ids=list(new.token_ids),
        num_prompt_tokens=new.num_prompt_tokens,
        num_prompt_logprobs=new.sampling.num_prompt_logprobs,
        sampling=row_sampling(new.sampling),
    )


def row_sampling(sampling: SamplingParams) -> RowSampling:
    """What drawing must know of a request's parameters."""
    return RowSampling(
        seed=sampling.seed,
        choice=sampling.choice,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        num_logprobs=sampling.num_logprobs,
    )
