"""Steps on a GPU: the host says which rows run, the device knows their tokens. Nothing here waits for the device but
the results, so that the next step is on its way while one runs. Runs plans strictly in the order given.

Steps run as graphs where those pay (model/captured_sizes.py); the launches of all others are made one by one.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmd.model.captured_sizes import NOTHING_CAPTURED, CapturedSizes
from llmd.model.inputs import ModelInputs
from llmd.model.kv_cache import KvCache
from llmd.protocol.steps import StepPlan, StepResult
from llmd.worker.answers import LaunchedStep, LogprobsTable
from llmd.worker.captured_work import CapturedWork
from llmd.worker.places import NO_ROWS, Places, StepRows
from llmd.worker.runner import DoneStep, PendingStep
from llmd.worker.step_bucket import StepBucket, StepKind, StepSize, allocate_bucket
from llmd.worker.step_buffer import PackedStep, StepMemory, pack
from llmd.worker.stream import Stream
from llmd_kernels import (
    AttentionBatch,
    AttentionWork,
    DeviceSampling,
    HostLens,
    LayerKind,
    NewEntries,
    PackedWork,
    StepInputs,
    allocate_inputs,
    allocate_tables,
    allocate_work,
    append_token_ids,
    pack_work,
    sample_on_device,
    step_inputs,
    token_logprobs_on_device,
    write_differences,
)

# Numbers that a captured step may be sent: 256 rows take 6,000, the rest is for the tokens of new sequences.
_CAPTURED_NUMBERS = 1 << 16
# Where a library serves a dtype that has no kernel of its own: with such a number of rows it sums in one order.
TOKEN_MULTIPLE = 8


class Model(Protocol):
    """What the runner asks of a network."""

    @property
    def layer_kinds(self) -> Sequence[LayerKind]:
        """What attention's work lists must be made for."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def can_draw(self) -> bool:
        """Whether `draw` may be called."""

    def hidden(self, inputs: ModelInputs, kv: KvCache) -> Tensor:
        """What the head reads, [num_logits, hidden_size]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [num_logits, vocab] float32."""

    def draw(self, hidden: Tensor, sampling: DeviceSampling) -> Tensor:
        """Tokens [num_logits] int64, drawn plainly, by the first rows of `sampling`; no logits are written."""


class GpuRunner:
    """Runs plans. The cache has one block more than the scheduler knows of, for padding tokens.

    captured: the steps to capture. Where attention has no kernel for the model there are none.
    """

    def __init__(
        self,
        model: Model,
        kv: KvCache,
        stream: Stream,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_tokens: int,
        device: torch.device,
        captured: CapturedSizes = NOTHING_CAPTURED,
    ) -> None:
        self._model = model
        self._kv = kv
        self._stream = stream
        self._device = device
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._places = Places(max_num_seqs)
        self._tables = allocate_tables(max_num_seqs, max_model_len, block_size=kv.block_size, device=device)
        # of steps whose launches are made one by one: each uses as much of them as it needs
        num_logits = max_num_tokens + max_num_seqs
        num_tokens = _padded(max_num_tokens)
        self._inputs = allocate_inputs(max_num_seqs, num_tokens, num_logits, device=device)

        self._buckets: dict[StepSize, StepBucket] = {}
        self._sent = self._memory(torch.zeros(_CAPTURED_NUMBERS, dtype=torch.int32, device=device))
        self._drawn = torch.zeros(captured.max_rows, dtype=torch.int64, device=device)
        self._hidden = torch.zeros(captured.max_rows, model.hidden_size, dtype=model.dtype, device=device)
        # that of the largest bucket has room for what the programs of all others hand to one another
        self._largest_work: AttentionWork | None = None
        if captured.rows:
            self._largest_work = self._allocate_work(StepSize(captured.max_rows, captured.max_tokens))
        self.captured = captured if self._largest_work is not None else NOTHING_CAPTURED
        self._steps = CapturedWork(stream, self._run_captured, self._kinds())

    def _kinds(self) -> list[StepKind]:
        """Of all steps that are captured. A decode step takes the least beside its launches, so those come first."""
        decoding = [StepSize(size, size) for size in self.captured.rows]
        other = [StepSize(self.captured.max_rows, size) for size in self.captured.tokens]
        endings = [True, False] if self._model.can_draw else [False]
        return [StepKind(size, draws) for draws in endings for size in decoding] + [
            StepKind(size, draws=False) for size in other
        ]

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Put one step into the device's queue."""
        rows, new_entries = self._places.take_in(plan)
        if not rows:
            return DoneStep(StepResult(step_id=plan.step_id, token_ids=[]))
        size = self._captured_size(rows)
        if size is not None:
            packed = self._pack(rows, new_entries, max_rows=size.max_rows)
            if len(packed.numbers) <= _CAPTURED_NUMBERS:
                return self._launch_captured(plan.step_id, rows, packed, size)
        return self._launch_eagerly(plan.step_id, rows, new_entries)

    @torch.inference_mode()
    def prepare(self) -> bool:
        """Capture one kind of step, by steps without rows: they change nothing."""
        kind = self._steps.next_to_capture()
        if kind is None:
            return False
        self._allocate_bucket(kind.size)
        nothing = pack(NO_ROWS, [], self._places.records, max_rows=kind.size.max_rows, can_draw=kind.draws)
        self._stream.upload(nothing.numbers, self._sent.numbers)
        # the first time loads what it launches, the second time it is captured
        self._steps.run(kind)
        self._steps.run(kind)
        return True

    def _memory(self, numbers: Tensor) -> StepMemory:
        return StepMemory(numbers, history=self._tables.token_ids)

    def _pack(
        self, rows: StepRows, new_entries: list[NewEntries], *, max_rows: int, work: PackedWork | None = None
    ) -> PackedStep:
        can_draw = self._model.can_draw
        return pack(rows, new_entries, self._places.records, max_rows=max_rows, can_draw=can_draw, work=work)

    def _captured_size(self, rows: StepRows) -> StepSize | None:
        """The smallest that holds these rows; None where such steps are not captured."""
        if rows.prompts or len(rows) > self.captured.max_rows:
            return None
        if rows.total_tokens == len(rows):
            size = self.captured.rows[bisect_left(self.captured.rows, len(rows))]
            return StepSize(size, size)
        index = bisect_left(self.captured.tokens, rows.total_tokens)
        if index == len(self.captured.tokens):
            return None
        return StepSize(self.captured.max_rows, self.captured.tokens[index])

    def _launch_captured(self, step_id: int, rows: StepRows, packed: PackedStep, size: StepSize) -> PendingStep:
        # with room for more rows than most steps of the size have, the head would compute what nobody draws from
        kind = StepKind(size, draws=packed.draws_plainly and size.max_rows == size.max_tokens)
        self._allocate_bucket(size)
        self._stream.upload(packed.numbers, self._sent.numbers)
        self._steps.run(kind)
        if kind.draws:
            return LaunchedStep(step_id, rows, self._drawn[: len(rows.drawing)], self._stream)
        hidden = self._hidden[: size.max_rows]
        return self._finish(step_id, rows, packed, self._sent, hidden, self._buckets[size].inputs)

    def _run_captured(self, kind: StepKind) -> None:
        """What is captured: it reads and writes memory at fixed addresses alone."""
        bucket, max_rows = self._buckets[kind.size], kind.size.max_rows
        self._take_in_step(self._sent, bucket.inputs, bucket.work_lists)
        hidden = self._model.hidden(bucket.model_inputs, self._kv)
        if kind.draws:
            drawn = self._model.draw(hidden, self._sent.plain_draws(max_rows=max_rows, num_rows=max_rows))
            append_token_ids(drawn, self._tables, bucket.inputs)
            self._drawn[:max_rows].copy_(drawn)
        else:
            self._hidden[:max_rows].copy_(hidden)

    def _take_in_step(self, sent: StepMemory, inputs: StepInputs, work_lists: AttentionWork | None) -> None:
        """What the host has sent → the tables, and the inputs of the step."""
        max_rows = len(inputs.kv_lens)
        step = sent.step(max_rows=max_rows)
        write_differences(step, self._tables, max_rows=max_rows)
        step_inputs(
            step,
            self._tables,
            inputs,
            block_size=self._kv.block_size,
            work_lists=work_lists,
        )

    def _launch_eagerly(self, step_id: int, rows: StepRows, new_entries: list[NewEntries]) -> PendingStep:
        packed = self._pack(rows, new_entries, max_rows=self._max_num_seqs, work=self._planned(rows))
        sent = self._memory(torch.empty(len(packed.numbers), dtype=torch.int32, device=self._device))
        self._stream.upload(packed.numbers, sent.numbers)
        num_tokens = _padded(rows.total_tokens)
        num_logits = int(rows.num_logits.sum())
        inputs = replace(
            self._inputs,
            token_ids=self._inputs.token_ids[:num_tokens],
            positions=self._inputs.positions[:num_tokens],
            slots=self._inputs.slots[:num_tokens],
            logit_rows=self._inputs.logit_rows[:num_logits],
        )
        self._take_in_step(sent, inputs, None)
        model_inputs = ModelInputs(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            slots=inputs.slots,
            attention=AttentionBatch(
                inputs.query_starts[: len(rows) + 1],
                inputs.kv_lens[: len(rows)],
                self._tables.block_tables,
                self._kv.block_size,
                places=inputs.places[: len(rows)],
                work_lists=sent.work(packed),
            ),
            logit_rows=inputs.logit_rows,
        )
        hidden = self._model.hidden(model_inputs, self._kv)
        return self._finish(step_id, rows, packed, sent, hidden, inputs)

    def _planned(self, rows: StepRows) -> PackedWork | None:
        """Attention's work lists made on the host, which knows all lengths: so they are as long as this step needs.

        None where attention has no kernel for the model: PyTorch's operators read the lengths back.
        """
        lens = HostLens(
            query_starts=np.concatenate(([0], rows.num_tokens.cumsum())),
            kv_lens=(rows.starts + rows.num_tokens).astype(np.int64),
            places=rows.places.astype(np.int64),
        )
        return pack_work(
            self._model.layer_kinds,
            lens,
            block_size=self._kv.block_size,
            q_dtype=self._model.dtype,
            cache_dtype=self._kv.layers[0].k.dtype,
            device=self._device,
        )

    def _finish(
        self, step_id: int, rows: StepRows, packed: PackedStep, sent: StepMemory, hidden: Tensor, inputs: StepInputs
    ) -> PendingStep:
        """Draw from hidden states, whatever the rows ask for. Prompt tokens' states come before each row's own."""
        num_drawn = len(rows.drawing)
        tables = list(self._prompt_logprobs(rows, hidden))
        drawn = self._drawn[:0]
        if num_drawn:
            own = hidden[inputs.sampled_logits[:num_drawn]] if tables else hidden[:num_drawn]
            sampling = sent.draws(packed)
            if packed.draws_plainly:
                drawn = self._model.draw(own, sampling)
            else:
                logits = self._model.logits(own)
                drawn = sample_on_device(logits, sampling)
                if rows.num_logprobs:
                    logprobs = token_logprobs_on_device(logits, drawn, max(rows.num_logprobs.values()))
                    tables.append(LogprobsTable(logprobs, rows.drawing.tolist(), of_prompt=False))
            append_token_ids(drawn, self._tables, inputs)
        return LaunchedStep(step_id, rows, drawn, self._stream, logprobs=tables)

    def _prompt_logprobs(self, rows: StepRows, hidden: Tensor) -> Iterator[LogprobsTable]:
        """In slabs, because logits of many tokens are large."""
        first_logits = rows.num_logits.cumsum() - rows.num_logits
        for row, wanted in rows.prompts.items():
            place, start, first = int(rows.places[row]), int(rows.starts[row]), int(first_logits[row])
            own, token_ids = hidden[first : first + wanted.num_tokens], self._tables.token_ids[place, start + 1 :]
            for slab in range(0, wanted.num_tokens, self._max_num_seqs):
                logits = self._model.logits(own[slab : slab + self._max_num_seqs])
                next_ids = token_ids[slab : slab + len(logits)].long()
                logprobs = token_logprobs_on_device(logits, next_ids, wanted.num_top)
                yield LogprobsTable(logprobs, [row] * len(logits), of_prompt=True)

    def _allocate_bucket(self, size: StepSize) -> None:
        """Once for each."""
        if size not in self._buckets:
            work_lists = self._allocate_work(size)
            assert work_lists is not None
            self._buckets[size] = allocate_bucket(
                size, self._tables, work_lists, block_size=self._kv.block_size, device=self._device
            )

    def _allocate_work(self, size: StepSize) -> AttentionWork | None:
        return allocate_work(
            self._model.layer_kinds,
            max_seqs=size.max_rows,
            max_tokens=size.max_tokens,
            max_len=self._max_model_len,
            block_size=self._kv.block_size,
            q_dtype=self._model.dtype,
            cache_dtype=self._kv.layers[0].k.dtype,
            device=self._device,
            scratch=None if self._largest_work is None else self._largest_work.scratch,
        )


def _padded(num_tokens: int) -> int:
    return -(-num_tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
