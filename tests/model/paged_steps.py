"""Runs token lists through a decoder with a paged cache, as a worker would, but one call at a time."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from llmd.model.decoder import Decoder
from llmd.model.inputs import ModelInputs
from llmd.model.kv_cache import allocate_kv_cache
from llmd_kernels import AttentionBatch


class PagedSequences:
    """Sequences with shuffled block tables over one cache. Remembers only how many tokens of each have run."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_seqs: int,
        max_len: int,
        block_size: int = 4,
        seed: int = 0,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        blocks_each = -(-max_len // block_size)
        blocks = list(range(num_seqs * blocks_each))
        random.Random(seed).shuffle(blocks)
        self.decoder = decoder
        self.block_size = block_size
        self.block_tables = [blocks[s * blocks_each : (s + 1) * blocks_each] for s in range(num_seqs)]
        self.lens = [0] * num_seqs
        self.kv = allocate_kv_cache(
            decoder.spec,
            # nobody owns the last one
            num_blocks=len(blocks) + 1,
            block_size=block_size,
            dtype=kv_dtype or decoder.dtype,
            device=decoder.device,
        )

    def step(self, tokens: dict[int, Sequence[int]]) -> dict[int, Tensor]:
        """Run the next tokens of each sequence → the logits [num_tokens, vocab_size] of all of them, by sequence."""
        inputs = self.inputs(tokens)
        logits = self.decoder.forward(inputs, self.kv).split([len(ids) for ids in tokens.values()])
        return dict(zip(tokens, logits, strict=True))

    def inputs(self, tokens: dict[int, Sequence[int]]) -> ModelInputs:
        """The next tokens of each sequence as one step that wants all logits; they count as run from now on."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for s, ids in tokens.items():
            for position in range(self.lens[s], self.lens[s] + len(ids)):
                block = self.block_tables[s][position // self.block_size]
                positions.append(position)
                slots.append(block * self.block_size + position % self.block_size)
            token_ids += ids
            self.lens[s] += len(ids)
            starts.append(len(token_ids))
        num_tokens = len(token_ids)
        padding = [0] * (-num_tokens % 8)
        return ModelInputs(
            token_ids=torch.tensor(token_ids + padding),
            positions=torch.tensor(positions + padding),
            slots=torch.tensor(slots + [-1] * len(padding)),
            attention=AttentionBatch(
                query_starts=torch.tensor(starts),
                kv_lens=torch.tensor([self.lens[s] for s in tokens]),
                block_tables=torch.tensor([self.block_tables[s] for s in tokens]),
                block_size=self.block_size,
            ),
            logit_rows=torch.arange(num_tokens),
        )


def logits_in_one_step(
    decoder: Decoder, sequences: list[list[int]], *, kv_dtype: torch.dtype | None = None
) -> list[Tensor]:
    run = PagedSequences(decoder, num_seqs=len(sequences), max_len=max(map(len, sequences)), kv_dtype=kv_dtype)
    logits = run.step(dict(enumerate(sequences)))
    return [logits[s] for s in range(len(sequences))]


def hidden_in_one_step(decoder: Decoder, sequences: list[list[int]]) -> Tensor:
    """What the head reads, [num_tokens, hidden_size], of all tokens."""
    run = PagedSequences(decoder, num_seqs=len(sequences), max_len=max(map(len, sequences)))
    return decoder.hidden(run.inputs(dict(enumerate(sequences))), run.kv)


def logits_in_chunks(
    decoder: Decoder, sequences: list[list[int]], sizes: Sequence[int], *, kv_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Every sequence in chunks of these sizes in turn; the last size goes on until the end."""
    run = PagedSequences(decoder, num_seqs=len(sequences), max_len=max(map(len, sequences)), seed=1, kv_dtype=kv_dtype)
    logits: list[list[Tensor]] = [[] for _ in sequences]
    sizes = list(sizes)
    while any(run.lens[s] < len(ids) for s, ids in enumerate(sequences)):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        chunks = {s: ids[run.lens[s] : run.lens[s] + size] for s, ids in enumerate(sequences)}
        for s, rows in run.step({s: ids for s, ids in chunks.items() if ids}).items():
            logits[s].append(rows)
    return [torch.cat(rows) for rows in logits]
