"""Draw one token from each row of logits: a pure function of (logits, parameters, seed, position)."""

from torch import Tensor

from llmd_kernels.dispatch import uses_triton
from llmd_kernels.sample import torch_device, torch_ops
from llmd_kernels.sample.batch import RowSampling, SampledTokens, SamplingBatch
from llmd_kernels.sample.device import (
    DeviceSampling,
    PackedSampling,
    pack_sampling,
    packed_sampling_size,
    plain_sampling,
)
from llmd_kernels.sample.records import SamplingRecords

__all__ = [
    "DeviceSampling",
    "PackedSampling",
    "RowSampling",
    "SampledTokens",
    "SamplingBatch",
    "SamplingRecords",
    "pack_sampling",
    "packed_sampling_size",
    "plain_sampling",
    "sample",
    "sample_on_device",
]


def sample(logits: Tensor, batch: SamplingBatch, *, mask: Tensor | None = None) -> SampledTokens:
    """logits [R, V] float32 (not changed), mask [R, V] bool or None (True = allowed) → one token a row.

    The order of processing and the exact meaning of each filter: README.md of this folder.
    """
    if uses_triton(logits):
        from llmd_kernels.sample import host_batch

        return host_batch.sample(logits, batch, mask=mask)
    return torch_ops.sample(logits, batch, mask=mask)


def sample_on_device(logits: Tensor, sampling: DeviceSampling) -> Tensor:
    """logits [R, V] of any float dtype (not changed) → one token a row, [R] int64, on the logits' device.

    The same processing as `sample`, without reading anything back to the host: it can be recorded in a CUDA graph, and
    neither the host's lists nor the tokens drawn before need be known. At least one token of a row must be allowed.
    """
    if uses_triton(logits):
        from llmd_kernels.sample import triton_ops

        return triton_ops.sample_on_device(logits, sampling)
    return torch_device.sample_on_device(logits, sampling)
