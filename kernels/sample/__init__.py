"""Draw one token from each row of logits: a pure function of (logits, parameters, seed, position)."""

from torch import Tensor

from llmd_kernels.sample import torch_ops
from llmd_kernels.sample.batch import RowSampling, SampledTokens, SamplingBatch

__all__ = ["RowSampling", "SampledTokens", "SamplingBatch", "sample"]


def sample(logits: Tensor, batch: SamplingBatch, *, mask: Tensor | None = None) -> SampledTokens:
    """logits [R, V] float32 (not changed), mask [R, V] bool or None (True = allowed) → one token a row.

    The order of processing and the exact meaning of each filter: README.md of this folder.
    """
    return torch_ops.sample(logits, batch, mask=mask)
