"""`rope_kv_write` with PyTorch operators: one gather of angles, one rotation, two scatters."""

import torch
from torch import Tensor

from llmd_kernels.rms_norm import rms_norm
from llmd_kernels.rope_kv_write.reference import LARGEST_FLOAT8


def rope_kv_write(
    qkv: Tensor,
    *,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    cos_sin: Tensor | None,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_weight_offset: float = 0.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Computed in float32 at least, each output rounded once."""
    block_size, head_dim = k_cache.shape[2:]
    projected = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
    wide = projected.to(torch.promote_types(qkv.dtype, torch.float32))
    qk, v = wide[:, :-num_kv_heads], projected[:, -num_kv_heads:]
    if q_norm is not None or k_norm is not None:
        norms = ((qk[:, :num_heads], q_norm), (qk[:, num_heads:], k_norm))
        qk = torch.cat(
            [
                part if weight is None else rms_norm(part, weight, norm_eps, weight_offset=norm_weight_offset)
                for part, weight in norms
            ],
            dim=1,
        )
    if cos_sin is not None:
        qk = _rotate(qk, cos_sin.index_select(0, positions).to(wide.dtype)[:, None], interleaved=interleaved)
    # Slot −1 is the last offset of block −1, the cache's last.
    blocks, offsets = slots // block_size, slots % block_size
    for heads, cache, scales in ((qk[:, num_heads:], k_cache, k_scales), (v, v_cache, v_scales)):
        if scales is not None:
            scale = _scales_of(heads.to(wide.dtype))
            scales[blocks, :, offsets] = scale.to(scales.dtype)
            heads = heads.to(wide.dtype) / scale[..., None]
        cache[blocks, :, offsets] = heads.to(cache.dtype)
    return qk[:, :num_heads].to(qkv.dtype).contiguous()


def _scales_of(heads: Tensor) -> Tensor:
    """[T, H, D] → [T, H]: what brings each head's largest number to the largest of float8_e4m3fn; 1 for zeros."""
    scales = heads.abs().amax(dim=-1) / LARGEST_FLOAT8
    return scales.masked_fill(scales == 0, 1.0)


def _rotate(heads: Tensor, angles: Tensor, *, interleaved: bool) -> Tensor:
    """heads [T, H, D], angles [T, 1, rot_dim] → [T, H, D], the first rot_dim entries turned."""
    rot_dim = angles.shape[-1]
    cos, sin = angles.chunk(2, dim=-1)
    turned = torch.empty_like(heads, memory_format=torch.contiguous_format)
    turned[..., rot_dim:] = heads[..., rot_dim:]
    pairs = (
        (slice(0, rot_dim, 2), slice(1, rot_dim, 2))
        if interleaved
        else (slice(rot_dim // 2), slice(rot_dim // 2, rot_dim))
    )
    a, b = heads[..., pairs[0]], heads[..., pairs[1]]
    turned[..., pairs[0]] = (a * cos).sub_(b * sin)
    turned[..., pairs[1]] = (b * cos).add_(a * sin)
    return turned
