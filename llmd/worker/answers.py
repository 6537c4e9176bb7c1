"""From what a step left on the device to its result: one copy to the host, and what its numbers mean.

The numbers of a step are float64, which holds token ids and float32 exactly: the drawn token ids first, then tables of
log-probabilities, a row a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmd.protocol.generation import TokenLogprobs
from llmd.protocol.steps import StepResult
from llmd.worker.places import StepRows
from llmd.worker.stream import Stream
from llmd_kernels import DeviceLogprobs

# Numbers about a token itself: id, log-probability, rank.
_NUM_OWN = 3


@dataclass(frozen=True, slots=True)
class LogprobsTable:
    """Log-probabilities of some tokens, and whose they are."""

    logprobs: DeviceLogprobs
    owners: Sequence[int]  # [num_tokens]: indices into the step's rows
    of_prompt: bool

    @property
    def num_top(self) -> int:
        return self.logprobs.top_ids.shape[1]

    def numbers(self) -> Tensor:
        """A row a token: its id, log-probability and rank; the ids of the most likely tokens, then their own."""
        found = self.logprobs
        of_token = torch.stack([found.token_ids.double(), found.logprobs.double(), found.ranks.double()], dim=1)
        return torch.cat([of_token, found.top_ids.double(), found.top_logprobs.double()], dim=1)


class LaunchedStep:
    """A PendingStep: what it drew is on its way to the host."""

    def __init__(
        self,
        step_id: int,
        rows: StepRows,
        drawn: Tensor,
        stream: Stream,
        *,
        logprobs: Sequence[LogprobsTable] = (),
    ) -> None:
        """drawn [num_drawn] int64: the tokens of the rows that sample, in order."""
        self._step_id = step_id
        self._rows = rows
        self._logprobs = logprobs
        parts = [drawn.double(), *(table.numbers().flatten() for table in logprobs)] if logprobs else [drawn]
        self._arriving = stream.download(torch.cat(parts) if logprobs else drawn)

    def result(self) -> StepResult:
        """Wait for the copy; read each row's part."""
        numbers = self._arriving.wait().tolist()
        if not self._logprobs:
            return StepResult(step_id=self._step_id, token_ids=numbers)
        rows = self._rows
        first = len(rows.drawing)
        token_ids = [int(number) for number in numbers[:first]]
        # by sequence id
        of_drawn: dict[int, TokenLogprobs] = {}
        of_prompt: dict[int, list[TokenLogprobs]] = {}
        for table in self._logprobs:
            width = _NUM_OWN + 2 * table.num_top
            for owner in table.owners:
                entry = numbers[first : first + width]
                first += width
                sequence_id = rows.sequence_ids[owner]
                if table.of_prompt:
                    entries = of_prompt.setdefault(sequence_id, [])
                    entries.append(_on_the_wire(entry, table.num_top, rows.prompts[owner].num_top))
                elif owner in rows.num_logprobs:
                    of_drawn[sequence_id] = _on_the_wire(entry, table.num_top, rows.num_logprobs[owner])
        return StepResult(step_id=self._step_id, token_ids=token_ids, logprobs=of_drawn, prompt_logprobs=of_prompt)


def _on_the_wire(entry: list[float], num_top: int, num_wanted: int) -> TokenLogprobs:
    token_id, logprob, rank, *top = entry
    top_ids = [int(top_id) for top_id in top[:num_wanted]]
    return TokenLogprobs(int(token_id), logprob, int(rank), top_ids, top[num_top : num_top + num_wanted])
