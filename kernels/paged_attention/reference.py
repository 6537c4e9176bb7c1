"""The truth of `paged_attention`: one query and one head at a time. Any float dtype."""

import torch
from torch import Tensor

from llmd_kernels.paged_attention.batch import AttentionBatch


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Softmax over the keys that each query may see; zeros in the padding rows."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k_cache.shape[1]
    for s in range(batch.kv_lens.shape[0]):
        first_row, end_row = int(batch.query_starts[s]), int(batch.query_starts[s + 1])
        kv_len = int(batch.kv_lens[s])
        table_row = s if batch.places is None else int(batch.places[s])
        slots = [divmod(p, batch.block_size) for p in range(kv_len)]
        for row in range(first_row, end_row):
            position = kv_len - (end_row - row)
            first_key = 0 if window is None else max(0, position - window + 1)
            for head in range(q.shape[1]):
                places = [
                    (int(batch.block_tables[table_row, b]), head // group, o)
                    for b, o in slots[first_key : position + 1]
                ]
                k = torch.stack([k_cache[place] for place in places]).to(q.dtype)
                v = torch.stack([v_cache[place] for place in places]).to(q.dtype)
                if k_scales is not None and v_scales is not None:
                    k = k * torch.stack([k_scales[place] for place in places]).to(q.dtype)[:, None]
                    v = v * torch.stack([v_scales[place] for place in places]).to(q.dtype)[:, None]
                scores = (k @ q[row, head]) * scale
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1].to(scores.dtype)])
                weights = torch.softmax(scores, dim=0)[: len(places)]
                out[row, head] = weights @ v
    return out
