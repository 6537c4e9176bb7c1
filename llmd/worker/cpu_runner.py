"""Steps where the host is the device: inputs, forward pass, the drawn tokens. A step is done when `launch` returns."""

from typing import Protocol

import torch
from torch import Tensor

from llmd.model.inputs import ModelInputs
from llmd.model.kv_cache import KvCache
from llmd.protocol.generation import TokenLogprobs
from llmd.protocol.steps import StepPlan, StepResult
from llmd.worker.batch import Batch, PromptLogits, Row, build_batch
from llmd.worker.runner import DoneStep
from llmd.worker.sequences import Sequences
from llmd_kernels import SamplingBatch, sample, token_logprobs
from llmd_kernels import TokenLogprobs as KernelLogprobs


class Model(Protocol):
    """What the runner asks of a network."""

    def forward(self, inputs: ModelInputs, kv: KvCache) -> Tensor:
        """Logits [num_logits, vocab] float32."""


class CpuRunner:
    """Runs plans. The cache has one block more than the scheduler knows of, for padding tokens."""

    def __init__(self, model: Model, kv: KvCache, *, block_size: int, device: torch.device) -> None:
        self._model = model
        self._kv = kv
        self._block_size = block_size
        self._device = device
        self._sequences = Sequences()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> DoneStep:
        """Run one plan and append what it draws to this rank's copies."""
        rows = self._sequences.take_in(plan)
        if not rows:
            return DoneStep(StepResult(step_id=plan.step_id, token_ids=[]))
        batch = build_batch(rows, block_size=self._block_size, device=self._device)
        logits = self._model.forward(batch.inputs, self._kv)
        prompt_logprobs = {
            rows[wanted.row][0].sequence_id: _prompt_logprobs(rows[wanted.row], wanted, logits)
            for wanted in batch.prompt_logits
        }
        token_ids, logprobs = _draw(rows, batch, logits)
        return DoneStep(
            StepResult(step_id=plan.step_id, token_ids=token_ids, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
        )

    def prepare(self) -> bool:
        """There is nothing."""
        return False


def _draw(rows: list[Row], batch: Batch, logits: Tensor) -> tuple[list[int], dict[int, TokenLogprobs]]:
    """The drawn tokens, which are appended to their sequences, and by sequence id the logprobs that were asked for."""
    if not batch.sampled_rows:
        return [], {}
    drawing = [rows[row] for row in batch.sampled_rows]
    copies = [copy for _, copy in drawing]
    sampled = sample(
        logits[batch.sampled_logits],
        SamplingBatch(
            sampling=[copy.sampling for copy in copies],
            token_ids=[copy.token_ids for copy in copies],
            num_prompt_tokens=[copy.num_prompt_tokens for copy in copies],
        ),
    )
    token_ids: list[int] = sampled.token_ids.tolist()
    for copy, token_id in zip(copies, token_ids, strict=True):
        copy.token_ids.append(token_id)
    of_rows = zip(drawing, sampled.logprobs, strict=True)
    return token_ids, {step.sequence_id: _on_the_wire(logprobs) for (step, _), logprobs in of_rows if logprobs}


def _prompt_logprobs(row: Row, wanted: PromptLogits, logits: Tensor) -> list[TokenLogprobs]:
    num_top = row[1].num_prompt_logprobs
    assert num_top is not None
    token_ids = torch.tensor(wanted.token_ids, dtype=torch.int64, device=logits.device)
    end = wanted.first_logit + len(wanted.token_ids)
    return [_on_the_wire(entry) for entry in token_logprobs(logits[wanted.first_logit : end], token_ids, num_top)]


def _on_the_wire(logprobs: KernelLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        logprobs.token_id, logprobs.logprob, logprobs.rank, list(logprobs.top_ids), list(logprobs.top_logprobs)
    )
