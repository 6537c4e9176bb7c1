"""Rows for what draws: their parameters packed, their tokens in a table. CPU tensors."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmd_kernels import DeviceSampling, RowSampling, SamplingRecords, pack_sampling

NUM_PLACES, MAX_LEN = 16, 24
# What no sequence has in the table: a token that exists, as an earlier sequence may have left it.
LEFT = 1

History = tuple[Sequence[int], Sequence[int]]


def on_device(
    rows: Sequence[RowSampling],
    histories: Sequence[History] | None = None,
    *,
    mask: Tensor | None = None,
    max_rows: int | None = None,
    table_size: tuple[int, int] = (NUM_PLACES, MAX_LEN),
) -> DeviceSampling:
    """histories: (prompt, output) of each row; mask [R, V] bool: which tokens every second row may draw. max_rows: of
    the buffer; those that are not in use are there too.

    Sequences lie at places from the last on.
    """
    histories = histories or [([0], [])] * len(rows)
    table = torch.full(table_size, LEFT, dtype=torch.int32)
    places = [table_size[0] - 1 - r % table_size[0] for r in range(len(rows))]
    for place, (prompt, output) in zip(places, histories, strict=True):
        table[place, : len(prompt) + len(output)] = torch.tensor([*prompt, *output], dtype=torch.int32)
    packed = pack_sampling(
        SamplingRecords.of(rows, prompt_lens=[len(prompt) for prompt, _ in histories], places=places),
        columns=range(len(rows)),
        positions=[len(output) for _, output in histories],
        bitmask_rows=None if mask is None else [r if r % 2 else -1 for r in range(len(rows))],
        max_rows=max_rows,
    )
    bitmask = None if mask is None else bitmask_of(mask)
    every_row = replace(packed, num_rows=packed.max_rows)
    return every_row.copied_to(torch.device("cpu"), history=table, bitmask=bitmask)


def bitmask_of(mask: Tensor) -> Tensor:
    """mask [R, V] bool → [R, ceil(V / 32)] int32."""
    wide = torch.nn.functional.pad(mask.long(), (0, -mask.shape[1] % 32))
    return (wide.view(len(mask), -1, 32) << torch.arange(32)).sum(dim=2).to(torch.int32)
