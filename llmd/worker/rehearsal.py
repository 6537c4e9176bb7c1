"""The steps that will come, gone through with tensors that have no memory: what they would launch is what must be
compiled. Nothing is read, computed or waited for.

Knows which properties of a step can choose another kernel: how many tokens run, how many are drawn, and how. How long
contexts are never does. Numbers count by powers of two, and by whether they divide by 16 or are 1.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from torch import Tensor

from llmd.protocol.generation import SamplingParams
from llmd.protocol.steps import NewSequence, StepPlan
from llmd.worker.gpu_runner import TOKEN_MULTIPLE, GpuRunner
from llmd.worker.stream import Download

PLAIN = SamplingParams(max_tokens=1, seed=0, temperature=0)
# Beside the rows that are drawn plainly; `num_logprobs` alone has logits written.
WAYS_OF_DRAWING = (
    SamplingParams(max_tokens=1, seed=0, top_k=2),
    SamplingParams(max_tokens=1, seed=0, logit_bias={0: 1.0}),
    SamplingParams(max_tokens=1, seed=0, repetition_penalty=2, min_p=0.5),
)
ABOUT_THE_PROMPT = SamplingParams(max_tokens=1, seed=0, num_prompt_logprobs=0)
# More may be allowed; that takes one kernel more, when it is asked for.
MAX_LOGPROBS = 20


class NoStream:
    """The stream of tensors without memory: there is nothing to copy and nothing to repeat."""

    def upload(self, numbers: npt.NDArray[np.int32], target: Tensor) -> None:
        pass

    def download(self, source: Tensor) -> Download:
        return _NoDownload()

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        return lambda: None


class _NoDownload:
    def wait(self) -> Tensor:
        raise RuntimeError("tensors without memory have no numbers")


def rehearse(runner: GpuRunner, *, max_num_seqs: int, max_num_tokens: int, max_model_len: int) -> Iterator[None]:
    """Run one step of each sort on a runner over tensors without memory; yields after each."""
    while runner.prepare():
        yield
    plans = _Plans(max_num_seqs, max_num_tokens, max_model_len)
    for num_tokens in _sizes(max_num_tokens, step=TOKEN_MULTIPLE):
        # of a size that is captured, and yet launched one by one
        is_small = num_tokens <= runner.captured.max_tokens
        runner.launch(plans.prefill(num_tokens, ABOUT_THE_PROMPT if is_small else PLAIN))
        yield
    for num_rows in _sizes(min(max_num_seqs, max_num_tokens - 1), step=1):
        for sampling in (PLAIN, _with_logprobs(0)):
            runner.launch(plans.drawing(num_rows, sampling))
            yield
    for sampling in (*WAYS_OF_DRAWING, *map(_with_logprobs, range(1, MAX_LOGPROBS + 1))):
        runner.launch(plans.drawing(1, sampling))
        yield


def _sizes(largest: int, *, step: int) -> list[int]:
    """On both sides of every power of two, and the largest."""
    powers = [step << exponent for exponent in range(largest.bit_length())]
    return sorted({min(size, largest) for power in powers for size in (power, power + step)})


def _with_logprobs(number: int) -> SamplingParams:
    return SamplingParams(max_tokens=1, seed=0, num_logprobs=number)


class _Plans:
    """Steps of new sequences alone, each in the place of those before."""

    def __init__(self, max_num_seqs: int, max_num_tokens: int, max_model_len: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._max_num_tokens = max_num_tokens
        self._max_model_len = max_model_len
        self._num_sequences = 0
        self._live: list[int] = []

    def prefill(self, num_tokens: int, sampling: SamplingParams) -> StepPlan:
        """So many tokens, of as few sequences as can have them, or as many as can."""
        full, rest = divmod(num_tokens, self._max_model_len)
        lens = ([self._max_model_len] * full + [rest] * (rest > 0))[: self._max_num_seqs]
        return self._plan(lens, sampling)

    def drawing(self, num_rows: int, sampling: SamplingParams) -> StepPlan:
        """So many tokens are drawn; one sequence more than a token long, so that it is no decode step."""
        return self._plan([min(2, self._max_model_len)] + [1] * (num_rows - 1), sampling)

    def _plan(self, lens: list[int], sampling: SamplingParams) -> StepPlan:
        dropped, first = self._live, self._num_sequences
        self._num_sequences += len(lens)
        self._live = list(range(first, self._num_sequences))
        return StepPlan(
            step_id=first,
            dropped=dropped,
            new=[
                NewSequence(sequence_id=id_, token_ids=[0] * length, num_prompt_tokens=length, sampling=sampling)
                for id_, length in zip(self._live, lens, strict=True)
            ],
            sequence_ids=self._live,
            starts=[0] * len(lens),
            num_tokens=lens,
            samples=[True] * len(lens),
        )
