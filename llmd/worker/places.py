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
    """Prompt tokens whose probabilities are wanted: a sequence's, or those that a row's first logits tell."""

    token_ids: list[int]
    num_top: int

    def following(self, start: int, num_tokens: int) -> "WantedPrompt":
        """Of a whole prompt, what the logits of these tokens tell: each the probability of the one after it."""
        return WantedPrompt(self.token_ids[start + 1 : start + num_tokens + 1], self.num_top)


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step, one entry each."""

    sequence_ids: list[int]
    given: Numbers  # [len(GIVEN_FIELDS), num_rows]: what `pack_step` takes; the next ones are its first
    places: Numbers
    starts: Numbers
    num_tokens: Numbers
    prompt_lens: Numbers
    num_logprobs: Numbers  # of the drawn token; -1: none are wanted
    prompts: Mapping[int, WantedPrompt]  # by row; most want none

    def __len__(self) -> int:
        return len(self.sequence_ids)

    @property
    def are_decoding(self) -> bool:
        """Whether all run one token, and nobody wants to know more of it than what comes after it."""
        return not self.prompts and bool((self.num_tokens == 1).all())

    @property
    def output_positions(self) -> Numbers:
        """Which output token each draws, from 0."""
        return self.starts + self.num_tokens - self.prompt_lens

    @property
    def num_logits(self) -> Numbers:
        """Of its prompt tokens, and the one that it draws from."""
        found: Numbers = self.given[3] + self.given[4]
        return found

    @property
    def drawing(self) -> npt.NDArray[np.intp]:
        """The rows that draw, in order."""
        return np.flatnonzero(self.given[4])


_NONE = np.zeros(0, np.int32)
NO_ROWS = StepRows([], np.zeros((len(GIVEN_FIELDS), 0), np.int32), _NONE, _NONE, _NONE, _NONE, _NONE, {})


class Places:
    """The live sequences, at most `num_places`."""

    def __init__(self, num_places: int) -> None:
        self._free = list(range(num_places))
        self._by_id: dict[int, int] = {}  # places by sequence id
        # by place
        self.records = SamplingRecords(num_places)
        self._prompt_lens = np.zeros(num_places, np.int32)
        self._num_logprobs = np.zeros(num_places, np.int32)
        self._num_blocks = [0] * num_places  # of the block table
        self._prompts: dict[int, WantedPrompt] = {}  # of sequences that want to know of theirs

    def take_in(self, plan: StepPlan) -> tuple[StepRows, list[NewEntries]]:
        """Forget what the plan drops, give places to what it brings → its rows, and what is new in the tables.

        A place may go to another sequence while steps of the last one are in flight: the device does all in order.
        """
        for sequence_id in plan.dropped:
            place = self._by_id.pop(sequence_id)
            self._prompts.pop(place, None)
            self._free.append(place)
        new_entries = [NewEntries(TOKEN_IDS, self._place(new), 0, new.token_ids) for new in plan.new]
        for sequence_id, block_ids in plan.new_block_ids.items():
            place = self._by_id[sequence_id]
            new_entries.append(NewEntries(BLOCK_TABLES, place, self._num_blocks[place], block_ids))
            self._num_blocks[place] += len(block_ids)
        on_rows = [self._by_id[sequence_id] for sequence_id in plan.sequence_ids]
        prompts = self._wanted_prompts(plan, on_rows) if self._prompts else {}
        places = np.array(on_rows, np.int32)
        given = np.zeros((len(GIVEN_FIELDS), len(on_rows)), np.int32)
        given[0] = places
        given[1] = np.array(plan.starts, np.int32)
        given[2] = np.array(plan.num_tokens, np.int32)
        for row, wanted in prompts.items():
            given[3, row] = len(wanted.token_ids)
        given[4] = np.array(plan.samples, np.bool_)
        rows = StepRows(
            sequence_ids=plan.sequence_ids,
            given=given,
            places=places,
            starts=given[1],
            num_tokens=given[2],
            prompt_lens=self._prompt_lens[places],
            num_logprobs=self._num_logprobs[places],
            prompts=prompts,
        )
        return rows, new_entries

    def _place(self, new: NewSequence) -> int:
        sampling = new.sampling
        place = self._by_id[new.sequence_id] = self._free.pop()
        self.records.put(place, row_sampling(sampling), prompt_len=new.num_prompt_tokens, place=place)
        self._prompt_lens[place] = new.num_prompt_tokens
        self._num_logprobs[place] = -1 if sampling.num_logprobs is None else sampling.num_logprobs
        self._num_blocks[place] = 0
        if sampling.num_prompt_logprobs is not None:
            prompt = new.token_ids[: new.num_prompt_tokens]
            self._prompts[place] = WantedPrompt(prompt, sampling.num_prompt_logprobs)
        return place

    def _wanted_prompts(self, plan: StepPlan, places: list[int]) -> dict[int, WantedPrompt]:
        found = {
            row: self._prompts[place].following(plan.starts[row], plan.num_tokens[row])
            for row, place in enumerate(places)
            if place in self._prompts
        }
        return {row: wanted for row, wanted in found.items() if wanted.token_ids}
