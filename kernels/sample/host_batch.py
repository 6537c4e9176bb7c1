"""`sample` by way of `sample_on_device`, for devices with kernels: the host's lists become tensors."""

import numpy as np
import torch
from torch import Tensor

from llmd_kernels.sample import triton_ops
from llmd_kernels.sample.batch import SampledTokens, SamplingBatch
from llmd_kernels.sample.device import DeviceSampling, pack_sampling
from llmd_kernels.sample.records import PENALIZES, SamplingRecords
from llmd_kernels.sample.torch_ops import logprobs_of


def sample(logits: Tensor, batch: SamplingBatch, *, mask: Tensor | None = None) -> SampledTokens:
    """Copies the parameters, and the tokens of the rows with penalties, to the device."""
    sampling = to_device(batch, logits.device, mask=mask)
    token_ids = triton_ops.sample_on_device(logits, sampling)
    return SampledTokens(token_ids, logprobs_of(logits, token_ids, batch))


def to_device(batch: SamplingBatch, device: torch.device, *, mask: Tensor | None = None) -> DeviceSampling:
    """A place for each row; mask [R, V] bool on the device."""
    places = range(len(batch))
    records = SamplingRecords.of(batch.sampling, prompt_lens=batch.num_prompt_tokens, places=places)
    columns = np.array(places, np.intp)
    positions = np.array([batch.position(r) for r in range(len(batch))], np.int32)
    packed = pack_sampling(
        records,
        columns=columns,
        positions=positions,
        bitmask_rows=None if mask is None else columns,
    )
    flags = records.flags(columns, positions)
    tokens = [ids if flag & PENALIZES else [] for flag, ids in zip(flags, batch.token_ids, strict=True)]
    history = torch.zeros(len(batch), max(map(len, tokens), default=0), dtype=torch.int32)
    for place, ids in enumerate(tokens):
        history[place, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    return packed.copied_to(
        device,
        history=history.to(device),
        bitmask=None if mask is None else packed_bits(mask),
    )


def packed_bits(mask: Tensor) -> Tensor:
    """mask [R, V] bool → [R, ceil(V / 32)] int32, the lowest bit first."""
    bits = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 32)).view(mask.shape[0], -1, 32)
    return (bits.long() << torch.arange(32, device=mask.device)).sum(dim=2).to(torch.int32)
