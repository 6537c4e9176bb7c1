"""From the fused projection to attention's inputs: head norms, rotary embedding, K and V into their slots."""

from torch import Tensor

from llmd_kernels.dispatch import uses_float8, uses_triton
from llmd_kernels.rope_kv_write import torch_ops


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
    """qkv [T, (num_heads + 2·num_kv_heads)·D] (Q, K, V heads in this order) → rotated Q [T, num_heads, D].

    positions, slots [T] int64; slot = block · block_size + offset, written in place; −1 for padding, whose K and V are
    nobody's. They are written nowhere, or by PyTorch's operators, for which −1 is the last one, to the last slot.
    k_cache, v_cache [num_blocks, num_kv_heads, block_size, D], of any float dtype; the last slot belongs to nobody.
    cos_sin [max_positions, rot_dim] float (rot_dim/2 cosines, then as many sines) or None for no rotation;
    rot_dim ≤ D even: the entries behind it pass through. `interleaved` turns the pairs (2i, 2i + 1), otherwise
    (i, rot_dim/2 + i).
    q_norm, k_norm [D] or None: weights of an RMS norm of each head, before the rotation.
    k_scales, v_scales [num_blocks, num_kv_heads, block_size] float32, for caches of float8_e4m3fn: each token's K and V
    of each head is divided by its largest magnitude / 448, which is written there.
    """
    if uses_triton(qkv) and (uses_triton(k_cache, v_cache) or uses_float8(k_cache, v_cache)):
        from llmd_kernels.rope_kv_write import triton_ops

        rope_kv_write_here = triton_ops.rope_kv_write
    else:
        rope_kv_write_here = torch_ops.rope_kv_write
    return rope_kv_write_here(
        qkv,
        positions=positions,
        slots=slots,
        k_cache=k_cache,
        v_cache=v_cache,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        cos_sin=cos_sin,
        interleaved=interleaved,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=norm_eps,
        norm_weight_offset=norm_weight_offset,
        k_scales=k_scales,
        v_scales=v_scales,
    )
