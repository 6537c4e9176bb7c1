"""What the host knows of sequences whose tokens and block tables live on the device: where, and how they are drawn.

Tokens that were drawn are known to the device alone, so nothing here depends on the result of a step. No tensors.

What every step needs lies in arrays, one entry a place or one a row: a step has hundreds of rows and no time for each.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmd.protocol.steps import NewSequence, StepPlan
from llmd.worker.sequences import row_sampling
from llmd_kernels import BLOCK_TABLES, GIVEN_FIELDS, TOKEN_IDS, NewEntries, SamplingRecords

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class WantedPrompt:
    """Prompt tokens whose probabilities a row's first logits tell, each that of the token after its own."""

    num_tokens: int
    num_top: int


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step, one entry each."""

    sequence_ids: list[int]
    given: Numbers  # [len(GIVEN_FIELDS), num_rows]: what `pack_step` takes; the next ones are its first
    places: Numbers
    starts: Numbers
    num_tokens: Numbers
    prompt_lens: Numbers
    total_tokens: int
    drawing: npt.NDArray[np.intp]  # the rows that draw, in order
    # by row; most want none
    num_logprobs: Mapping[int, int]  # beside the drawn token's
    prompts: Mapping[int, WantedPrompt]

    def __len__(self) -> int:
        return len(self.sequence_ids)

    @property
    def are_decoding(self) -> bool:
        """Whether all run one token, and nobody wants to know more of it than what comes after it."""
        return not self.prompts and self.total_tokens == len(self)

    @property
    def drawing_places_and_positions(self) -> tuple[Numbers, Numbers]:
        """Of the rows that draw: their places, and which output token each draws, from 0."""
        positions = self.starts + self.num_tokens - self.prompt_lens
        if len(self.drawing) == len(self):
            return self.places, positions
        return self.places[self.drawing], positions[self.drawing]

    @property
    def num_logits(self) -> Numbers:
        """Of its prompt tokens, and the one that it draws from."""
        found: Numbers = self.given[3] + self.given[4]
        return found


_NONE = np.zeros(0, np.int32)
NO_ROWS = StepRows(
    sequence_ids=[],
    given=np.zeros((len(GIVEN_FIELDS), 0), np.int32),
    places=_NONE,
    starts=_NONE,
    num_tokens=_NONE,
    prompt_lens=_NONE,
    total_tokens=0,
    drawing=np.zeros(0, np.intp),
    num_logprobs={},
    prompts={},
)


class Places:
    """The live sequences, at most `num_places`."""

    def __init__(self, num_places: int) -> None:
        self._free = list(range(num_places))
        self._by_id: dict[int, int] = {}  # places by sequence id
        # by place
        self.records = SamplingRecords(num_places)
        self._prompt_lens = np.zeros(num_places, np.int32)
        self._num_blocks = [0] * num_places  # of the block table
        # by place, of those who want any: beside the drawn token's, and each prompt token's
        self._num_logprobs: dict[int, int] = {}
        self._num_prompt_logprobs: dict[int, int] = {}

    def take_in(self, plan: StepPlan) -> tuple[StepRows, list[NewEntries]]:
        """Forget what the plan drops, give places to what it brings → its rows, and what is new in the tables.

        A place may go to another sequence while steps of the last one are in flight: the device does all in order.
        """
        for sequence_id in plan.dropped:
            place = self._by_id.pop(sequence_id)
            self.records.drop(place)
            self._num_logprobs.pop(place, None)
            self._num_prompt_logprobs.pop(place, None)
            self._free.append(place)
        new_entries = [NewEntries(TOKEN_IDS, self._place(new), 0, new.token_ids) for new in plan.new]
        for sequence_id, block_ids in plan.new_block_ids.items():
            place = self._by_id[sequence_id]
            new_entries.append(NewEntries(BLOCK_TABLES, place, self._num_blocks[place], block_ids))
            self._num_blocks[place] += len(block_ids)
        return self._rows(plan, list(map(self._by_id.__getitem__, plan.sequence_ids))), new_entries

    def _rows(self, plan: StepPlan, places: list[int]) -> StepRows:
        total_tokens = sum(plan.num_tokens)
        prompts = self._wanted_prompts(plan, places) if self._num_prompt_logprobs else {}
        given = np.empty((len(GIVEN_FIELDS), len(places)), np.int32)
        given[0] = places
        given[1] = plan.starts
        # most steps run one token of each sequence and draw the next
        given[2] = 1 if total_tokens == len(places) else plan.num_tokens
        given[3] = 0
        for row, wanted in prompts.items():
            given[3, row] = wanted.num_tokens
        given[4] = 1 if all(plan.samples) else plan.samples
        return StepRows(
            sequence_ids=plan.sequence_ids,
            given=given,
            places=given[0],
            starts=given[1],
            num_tokens=given[2],
            prompt_lens=self._prompt_lens.take(given[0]),
            total_tokens=total_tokens,
            drawing=given[4].nonzero()[0],
            num_logprobs=self._wanted_logprobs(plan, places) if self._num_logprobs else {},
            prompts=prompts,
        )

    def _place(self, new: NewSequence) -> int:
        sampling = new.sampling
        place = self._by_id[new.sequence_id] = self._free.pop()
        self.records.put(place, row_sampling(sampling), prompt_len=new.num_prompt_tokens, place=place)
        self._prompt_lens[place] = new.num_prompt_tokens
        self._num_blocks[place] = 0
        if sampling.num_logprobs is not None:
            self._num_logprobs[place] = sampling.num_logprobs
        if sampling.num_prompt_logprobs is not None:
            self._num_prompt_logprobs[place] = sampling.num_prompt_logprobs
        return place

    def _wanted_logprobs(self, plan: StepPlan, places: list[int]) -> dict[int, int]:
        wanted = self._num_logprobs
        return {row: wanted[place] for row, place in enumerate(places) if place in wanted and plan.samples[row]}

    def _wanted_prompts(self, plan: StepPlan, places: list[int]) -> dict[int, WantedPrompt]:
        wanted = {}
        for row, place in enumerate(places):
            if place in self._num_prompt_logprobs:
                start, end = plan.starts[row], plan.starts[row] + plan.num_tokens[row]
                num_tokens = min(end, int(self._prompt_lens[place]) - 1) - start
                if num_tokens > 0:
                    wanted[row] = WantedPrompt(num_tokens, self._num_prompt_logprobs[place])
        return wanted
