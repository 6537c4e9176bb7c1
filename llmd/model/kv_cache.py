"""The paged KV cache as memory: who owns which block is the engine's affair."""

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from llmd.model.parallel import Rank, units_of
from llmd.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer. Finite everywhere, also where nothing was written yet."""

    k: Tensor  # [num_blocks, num_kv_heads, block_size, head_dim]
    v: Tensor  # the same
    k_scales: Tensor | None  # [num_blocks, num_kv_heads, block_size] float32, where k and v are float8
    v_scales: Tensor | None  # the same


@dataclass(frozen=True, slots=True)
class KvCache:
    layers: tuple[LayerCache, ...]
    num_blocks: int
    block_size: int  # tokens of a block


def allocate_kv_cache(
    spec: ModelSpec,
    *,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    rank: Rank | None = None,
) -> KvCache:
    """A cache of zeros. On a CPU a page of it takes memory only once it is written to."""
    num_kv_heads = len(units_of(rank or Rank(), spec.num_kv_heads, "attention"))
    shape = (num_blocks, num_kv_heads, block_size, spec.head_dim)

    def layer() -> LayerCache:
        k, v = _zeros(shape, dtype, device), _zeros(shape, dtype, device)
        if dtype.itemsize > 1:
            return LayerCache(k, v, k_scales=None, v_scales=None)
        k_scales, v_scales = _zeros(shape[:3], torch.float32, device), _zeros(shape[:3], torch.float32, device)
        return LayerCache(k, v, k_scales=k_scales, v_scales=v_scales)

    layers = tuple(layer() for _ in spec.layers)
    return KvCache(layers=layers, num_blocks=num_blocks, block_size=block_size)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy leaves the zeroing to the operating system (calloc), torch writes it out and so touches every page
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
