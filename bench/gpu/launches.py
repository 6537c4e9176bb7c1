"""Launches for the compiler: with tensors that have no memory, as the measurements launch with real ones."""

from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import torch

from llmd_kernels import AttentionBatch
from llmd_kernels.linear import triton_ops as linear_ops
from llmd_kernels.linear.tiles import Tile
from llmd_kernels.paged_attention import triton_ops as attention_ops
from llmd_kernels.paged_attention.tiles import TileConfig
from tests.kernels.proof.inputs import meta


def launch_linear(shape: tuple[int, int], num_tokens: int, tile: Tile | None = None) -> None:
    """shape: (inputs, outputs). tile: None: the one that ships."""
    num_inputs, num_outputs = shape
    x, weight = meta(num_tokens, num_inputs, dtype=torch.bfloat16), meta(num_outputs, num_inputs, dtype=torch.bfloat16)
    with with_tile(tile):
        linear_ops.linear(x, weight)


def with_tile(tile: Tile | None) -> AbstractContextManager[object]:
    """Inside, every launch of `linear` has this tile."""
    return nullcontext() if tile is None else patch.object(linear_ops, "tile_of_launch", lambda *_, **__: tile)


def launch_attention(heads: tuple[int, int, int], block_size: int, config: TileConfig, *, num_seqs: int = 16) -> None:
    """heads: (query heads, KV heads, head size). Sequences that decode; numbers that are multiples of 16 are alike."""
    num_heads, num_kv_heads, head_dim = heads
    batch = AttentionBatch(
        torch.arange(num_seqs + 1), torch.full((num_seqs,), 1000), meta(num_seqs, 64, dtype=torch.int64), block_size
    )
    cache = meta(64, num_kv_heads, block_size, head_dim, dtype=torch.bfloat16)
    q = meta(num_seqs, num_heads, head_dim, dtype=torch.bfloat16)
    attention_ops.paged_attention(q, cache, cache, batch, scale=0.1, config=config, num_processors=100)
