"""Steps where the host is the device: inputs, forward pass, the drawn tokens. A step is done when `launch` returns."""

from typing import Protocol

import torch
from torch import Tensor

from llmd.model.inputs import ModelInputs
from llmd.model.kv_cache import KvCache
from llmd.protocol.generation import TokenLogprobs
from llmd.protocol.steps import SequenceResult, StepPlan, StepResult
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
            return DoneStep(StepResult(step_id=plan.step_id, results=[]))
        batch = build_batch(rows, block_size=self._block_size, device=self._device)
        logits = self._model.forward(batch.inputs, self._kv)
        return DoneStep(StepResult(step_id=plan.step_id, results=_results(rows, batch, logits)))

    def prepare(self) -> bool:
        """There is nothing."""
        return False


def _results(rows: list[Row], batch: Batch, logits: Tensor) -> list[SequenceResult]:
    prompt_logprobs = {wanted.row: _prompt_logprobs(rows[wanted.row], wanted, logits) for wanted in batch.prompt_logits}
    drawn = _draw(rows, batch, logits)
    results = []
    for row in sorted({*prompt_logprobs, *drawn}):
        step, _ = rows[row]
        token_id, logprobs = drawn.get(row, (None, None))
        results.append(SequenceResult(step.sequence_id, token_id, logprobs, tuple(prompt_logprobs.get(row, ()))))
    return results


def _draw(rows: list[Row], batch: Batch, logits: Tensor) -> dict[int, tuple[int, TokenLogprobs | None]]:
    """Row → the drawn token, which is appended to its sequence, and its logprobs if asked."""
    if not batch.sampled_rows:
        return {}
    copies = [rows[row][1] for row in batch.sampled_rows]
    sampled = sample(
        logits[batch.sampled_logits],
        SamplingBatch(
            sampling=[copy.sampling for copy in copies],
            token_ids=[copy.token_ids for copy in copies],
            num_prompt_tokens=[copy.num_prompt_tokens for copy in copies],
        ),
    )
    drawn: dict[int, tuple[int, TokenLogprobs | None]] = {}
    token_ids: list[int] = sampled.token_ids.tolist()
    for row, copy, token_id, logprobs in zip(batch.sampled_rows, copies, token_ids, sampled.logprobs, strict=True):
        copy.token_ids.append(token_id)
        drawn[row] = token_id, _on_the_wire(logprobs) if logprobs else None
    return drawn


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
