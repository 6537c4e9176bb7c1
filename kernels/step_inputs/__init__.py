"""A step's inputs, made on the device from what it already knows and the little that the host sends.

For each step: `pack_step` on the host, one copy, `write_differences`, `step_inputs`, the model, `append_token_ids`. All
but the first can be captured, and none waits for the device: the next step may be launched before this one's drawn
tokens are known to the host.
"""

from torch import Tensor

from llmd_kernels.dispatch import on_triton_device
from llmd_kernels.paged_attention.device_work import AttentionWork
from llmd_kernels.step_inputs import torch_ops
from llmd_kernels.step_inputs.buffers import SequenceTables, StepInputs, allocate_inputs, allocate_tables
from llmd_kernels.step_inputs.packing import BLOCK_TABLES, GIVEN_FIELDS, TOKEN_IDS, NewEntries, pack_step

__all__ = [
    "BLOCK_TABLES",
    "GIVEN_FIELDS",
    "TOKEN_IDS",
    "NewEntries",
    "SequenceTables",
    "StepInputs",
    "allocate_inputs",
    "allocate_tables",
    "append_token_ids",
    "pack_step",
    "step_inputs",
    "write_differences",
]


def write_differences(step: Tensor, tables: SequenceTables, *, max_rows: int) -> None:
    """Write the new entries of a packed step (int32, layout in packing.py) to the tables.

    Before `step_inputs`, which reads them. On devices without Triton it waits for the step to arrive.
    """
    if on_triton_device(step):
        from llmd_kernels.step_inputs import triton_ops

        triton_ops.write_differences(step, tables, max_rows=max_rows)
    else:
        torch_ops.write_differences(step, tables, max_rows=max_rows)


def step_inputs(
    step: Tensor,
    tables: SequenceTables,
    inputs: StepInputs,
    *,
    block_size: int,
    work_lists: AttentionWork | None = None,
) -> None:
    """Write all of `inputs`, and attention's work lists where there are any, from a packed step and the tables.

    step: int32, packed for max_rows = len(inputs.kv_lens), with at most as many tokens and logits as `inputs` holds.
    """
    if on_triton_device(step):
        from llmd_kernels.step_inputs import triton_ops

        triton_ops.step_inputs(step, tables, inputs, block_size=block_size)
    else:
        torch_ops.step_inputs(step, tables, inputs, block_size=block_size)
    if work_lists is not None:
        work_lists.plan(inputs.query_starts, inputs.kv_lens, inputs.places)


def append_token_ids(drawn: Tensor, tables: SequenceTables, inputs: StepInputs) -> None:
    """Write each drawn token behind its sequence's tokens: drawn [num_drawn ≤ max_rows] int64, in the order of rows.

    What lies behind the step's samples is ignored, and so is the token that follows a sequence of max_len tokens: no
    step will ever run it.
    """
    if on_triton_device(drawn):
        from llmd_kernels.step_inputs import triton_ops

        triton_ops.append_token_ids(drawn, tables, inputs)
    else:
        torch_ops.append_token_ids(drawn, tables, inputs)
