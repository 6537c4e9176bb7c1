"""The truth of `rope_kv_write`: token by token, head by head. Any float dtype."""

from torch import Tensor

from llmd_kernels.rms_norm import reference as rms_norm_reference

LARGEST_FLOAT8 = 448.0


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
    """Norm and rotate Q and K, write K and V to their slots, return Q [T, num_heads, D]."""
    block_size, head_dim = k_cache.shape[2], k_cache.shape[3]
    q_out = qkv.new_empty(qkv.shape[0], num_heads, head_dim)
    for t in range(qkv.shape[0]):
        heads = qkv[t].view(-1, head_dim)
        q, k, v = heads[:num_heads], heads[num_heads:-num_kv_heads], heads[-num_kv_heads:]
        if q_norm is not None:
            q = rms_norm_reference.rms_norm(q, q_norm, norm_eps, weight_offset=norm_weight_offset)
        if k_norm is not None:
            k = rms_norm_reference.rms_norm(k, k_norm, norm_eps, weight_offset=norm_weight_offset)
        if cos_sin is not None:
            row = cos_sin[int(positions[t])]
            q, k = rotate(q, row, interleaved=interleaved), rotate(k, row, interleaved=interleaved)
        q_out[t] = q
        if slots[t] < 0:
            continue
        block, offset = divmod(int(slots[t]), block_size)
        for heads, cache, scales in ((k, k_cache, k_scales), (v, v_cache, v_scales)):
            for h, head in enumerate(heads):
                scale = 1.0 if scales is None else scale_of(head)
                cache[block, h, offset] = (head / scale).to(cache.dtype)
                if scales is not None:
                    scales[block, h, offset] = scale
    return q_out


def scale_of(head: Tensor) -> float:
    """What brings the largest of a head's numbers to the largest of float8_e4m3fn; 1 where all are zero."""
    return float(head.abs().max()) / LARGEST_FLOAT8 or 1.0


def rotate(heads: Tensor, cos_sin_row: Tensor, *, interleaved: bool) -> Tensor:
    """Turn each pair (a, b) of the first rot_dim entries of heads [H, D] by its angle; the rest passes through."""
    half = cos_sin_row.shape[0] // 2
    turned = heads.clone()
    for i in range(half):
        cos, sin = cos_sin_row[i], cos_sin_row[half + i]
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, half + i)
        turned[:, a] = heads[:, a] * cos - heads[:, b] * sin
        turned[:, b] = heads[:, b] * cos + heads[:, a] * sin
    return turned
