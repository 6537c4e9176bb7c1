"""`sample` by way of `sample_on_device`, for devices with kernels: the host's lists become tensors."""

import torch
from torch import Tensor

from llmd_kernels.sample import triton_ops
from llmd_kernels.sample.batch import SampledTokens, SamplingBatch
from llmd_kernels.sample.device import DeviceSampling, pack_sampling, record_of
from llmd_kernels.sample.torch_ops import logprobs_of


def sample(logits: Tensor, batch: SamplingBatch, *, mask: Tensor | None = None) -> SampledTokens:
    """Copies the parameters, and the tokens of the rows with penalties, to the device."""
    sampling = to_device(batch, logits.device, mask=mask)
    token_ids = triton_ops.sample_on_device(logits, sampling)
    return SampledTokens(token_ids, logprobs_of(logits, token_ids, batch))


def to_device(batch: SamplingBatch, device: torch.device, *, mask: Tensor | None = None) -> DeviceSampling:
    """A place for each row; mask [R, V] bool on the device."""
    records = [record_of(row) for row in batch.sampling]
    packed = pack_sampling(
        records,
        positions=[batch.position(r) for r in range(len(batch))],
        prompt_lens=batch.num_prompt_tokens,
        places=range(len(batch)),
        bitmask_rows=None if mask is None else range(len(batch)),
    )
    tokens = [ids if record.penalizes else [] for record, ids in zip(records, batch.token_ids, strict=True)]
    history = torch.zeros(len(batch), max(map(len, tokens), default=0), dtype=torch.int32)
    for place, ids in enumerate(tokens):
        history[place, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    return packed.on_device(
        torch.from_numpy(packed.words).to(device),
        history=history.to(device),
        bitmask=None if mask is None else packed_bits(mask),
    )


def packed_bits(mask: Tensor) -> Tensor:
    """mask [R, V] bool → [R, ceil(V / 32)] int32, the lowest bit first."""
    bits = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 32)).view(mask.shape[0], -1, 32)
    return (bits.long() << torch.arange(32, device=mask.device)).sum(dim=2).to(torch.int32)
