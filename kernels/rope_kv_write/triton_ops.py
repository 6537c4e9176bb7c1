"""`rope_kv_write` in Triton: one launch reads each head once, norms and turns it, and writes it where it goes.

A program takes some heads of one kind (Q, K or V) of one token. A head is read as two halves of its pairs and, where
the rotation is partial, the rest; its norm is one fixed tree over them. Bits depend on the head's own numbers alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of a program: each thread of its two warps holds eight of each half, one load of 16 bytes.
NUMBERS_PER_PROGRAM = 1024
NUM_WARPS = 2


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
    """Computed in float32, each output rounded once. The caches have the same strides, each head's numbers together."""
    num_tokens, block_size, head_dim = qkv.shape[0], k_cache.shape[2], k_cache.shape[3]
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError(
            f"caches must be laid out alike, a head's numbers together: strides {k_cache.stride()}"
            f" and {v_cache.stride()}"
        )
    if k_scales is not None and v_scales is not None and k_scales.stride() != v_scales.stride():
        raise ValueError(f"scales must be laid out alike: strides {k_scales.stride()} and {v_scales.stride()}")
    if qkv.stride(1) != 1:
        qkv = qkv.contiguous()
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        rot_dim = 0 if cos_sin is None else cos_sin.shape[1]
        heads = max(1, NUMBERS_PER_PROGRAM // triton.next_power_of_2(head_dim))
        heads = min(heads, triton.next_power_of_2(max(num_heads, num_kv_heads)))
        q_programs, kv_programs = triton.cdiv(num_heads, heads), triton.cdiv(num_kv_heads, heads)
        rope_kv_write_kernel[(num_tokens, q_programs + 2 * kv_programs)](
            qkv,
            q,
            k_cache,
            v_cache,
            positions,
            slots,
            cos_sin,
            q_norm,
            k_norm,
            k_scales,
            v_scales,
            norm_eps,
            norm_weight_offset,
            qkv.stride(0),
            0 if cos_sin is None else cos_sin.stride(0),
            k_cache.stride(0),
            k_cache.stride(1),
            k_cache.stride(2),
            *((0, 0, 0) if k_scales is None else k_scales.stride()),
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            ROT_DIM=rot_dim,
            BLOCK_SIZE=block_size,
            INTERLEAVED=interleaved,
            HEADS=heads,
            PAIRS=triton.next_power_of_2(max(rot_dim // 2, 1)),
            REST=triton.next_power_of_2(max(head_dim - rot_dim, 1)),
            WHOLE=triton.next_power_of_2(head_dim),
            num_warps=NUM_WARPS,
        )
    return q


@triton.jit
def rope_kv_write_kernel(
    qkv,
    q,
    k_cache,
    v_cache,
    positions,
    slots,
    cos_sin,
    q_norm,
    k_norm,
    k_scales,
    v_scales,
    eps,
    weight_offset,
    qkv_stride,
    cos_sin_stride,
    block_stride,
    head_stride,
    slot_stride,
    scale_block_stride,
    scale_head_stride,
    scale_slot_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROT_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Grid: (tokens, programs of Q's heads, then of K's, then of V's)."""
    Q_PROGRAMS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_PROGRAMS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = qkv + token * qkv_stride
    lanes = tl.arange(0, HEADS)[:, None]
    if part < Q_PROGRAMS:
        heads = part * HEADS + lanes
        write_heads(
            row + heads * HEAD_DIM,
            q + (token * NUM_HEADS + heads) * HEAD_DIM,
            heads < NUM_HEADS,
            cos_sin,
            positions + token,
            cos_sin_stride,
            q_norm,
            eps,
            weight_offset,
            None,
            HEAD_DIM,
            ROT_DIM,
            INTERLEAVED,
            PAIRS,
            REST,
        )
    else:
        slot = tl.load(slots + token)
        is_kept = slot >= 0
        place = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride
        scale_place = slot // BLOCK_SIZE * scale_block_stride + slot % BLOCK_SIZE * scale_slot_stride
        if part < Q_PROGRAMS + KV_PROGRAMS:
            heads = (part - Q_PROGRAMS) * HEADS + lanes
            write_heads(
                row + (NUM_HEADS + heads) * HEAD_DIM,
                k_cache + place + heads * head_stride,
                (heads < NUM_KV_HEADS) & is_kept,
                cos_sin,
                positions + token,
                cos_sin_stride,
                k_norm,
                eps,
                weight_offset,
                None if k_scales is None else k_scales + scale_place + heads * scale_head_stride,
                HEAD_DIM,
                ROT_DIM,
                INTERLEAVED,
                PAIRS,
                REST,
            )
        else:
            heads = (part - Q_PROGRAMS - KV_PROGRAMS) * HEADS + lanes
            columns = tl.arange(0, WHOLE)[None, :]
            is_head = (heads < NUM_KV_HEADS) & is_kept
            mask = is_head & (columns < HEAD_DIM)
            v = tl.load(row + (NUM_HEADS + NUM_KV_HEADS + heads) * HEAD_DIM + columns, mask=mask, other=0.0)
            if v_scales is not None:
                v = v.to(tl.float32)
                scale = scale_of(tl.max(tl.abs(v), axis=1, keep_dims=True))
                tl.store(v_scales + scale_place + heads * scale_head_stride, scale, mask=is_head)
                v = v / scale
            tl.store(v_cache + place + heads * head_stride + columns, v.to(v_cache.dtype.element_ty), mask=mask)


@triton.jit
def write_heads(
    source,
    target,
    is_head,
    cos_sin,
    position,
    cos_sin_stride,
    norm,
    eps,
    weight_offset,
    scale_target,
    HEAD_DIM: tl.constexpr,
    ROT_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """source, target, is_head, scale_target [HEADS, 1]: read each head, norm it (if `norm` is given), turn it, scale it
    for float8 (if `scale_target` is given), write it."""
    rest = ROT_DIM + tl.arange(0, REST)[None, :]
    rest_mask = is_head & (rest < HEAD_DIM)
    # Without a rotation there are no pairs, with a whole one no rest: both are then a zero that changes nothing.
    if ROT_DIM > 0:
        first, second = load_pairs(source, is_head, ROT_DIM, INTERLEAVED, PAIRS)
    else:
        first, second = tl.zeros([is_head.shape[0], 1], tl.float32), tl.zeros([is_head.shape[0], 1], tl.float32)
    if ROT_DIM < HEAD_DIM:
        others = tl.load(source + rest, mask=rest_mask, other=0.0).to(tl.float32)
    else:
        others = tl.zeros([is_head.shape[0], 1], tl.float32)

    if norm is not None:
        squares = tl.sum(first * first + second * second, axis=1) + tl.sum(others * others, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        if ROT_DIM > 0:
            one = tl.full([1, 1], 1, tl.int1)
            first_weight, second_weight = load_pairs(norm, one, ROT_DIM, INTERLEAVED, PAIRS)
            first *= scale * (first_weight + weight_offset)
            second *= scale * (second_weight + weight_offset)
        if ROT_DIM < HEAD_DIM:
            weight = tl.load(norm + rest, mask=rest < HEAD_DIM, other=0.0).to(tl.float32)
            others *= scale * (weight + weight_offset)

    if ROT_DIM > 0:
        angles = cos_sin + tl.load(position) * cos_sin_stride
        pairs = tl.arange(0, PAIRS)[None, :]
        cos = tl.load(angles + pairs, mask=pairs < ROT_DIM // 2, other=0.0).to(tl.float32)
        sin = tl.load(angles + ROT_DIM // 2 + pairs, mask=pairs < ROT_DIM // 2, other=0.0).to(tl.float32)
        first, second = first * cos - second * sin, second * cos + first * sin

    if scale_target is not None:
        largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1, keep_dims=True)
        factor = scale_of(tl.maximum(largest, tl.max(tl.abs(others), axis=1, keep_dims=True)))
        tl.store(scale_target, factor, mask=is_head)
        first, second, others = first / factor, second / factor, others / factor

    if ROT_DIM > 0:
        store_pairs(target, is_head, first, second, ROT_DIM, INTERLEAVED, PAIRS)
    if ROT_DIM < HEAD_DIM:
        tl.store(target + rest, others.to(target.dtype.element_ty), mask=rest_mask)


@triton.jit
def scale_of(largest):
    """What brings the largest magnitude to the largest float8_e4m3fn; 1 for zeros."""
    return tl.where(largest > 0.0, largest / 448.0, 1.0)


@triton.jit
def load_pairs(source, is_head, ROT_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr):
    """The first and the second entry of each pair, float32 [HEADS, PAIRS]; neighbours are read together."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.load(source + columns, mask=is_head & (columns < ROT_DIM), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, [both.shape[0], PAIRS, 2]))
    else:
        columns = tl.arange(0, PAIRS)[None, :]
        mask = is_head & (columns < ROT_DIM // 2)
        first = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + ROT_DIM // 2 + columns, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(target, is_head, first, second, ROT_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr):
    """What `load_pairs` reads, written."""
    dtype: tl.constexpr = target.dtype.element_ty
    if INTERLEAVED:
        columns = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.reshape(tl.join(first, second), [first.shape[0], 2 * PAIRS])
        tl.store(target + columns, both.to(dtype), mask=is_head & (columns < ROT_DIM))
    else:
        columns = tl.arange(0, PAIRS)[None, :]
        mask = is_head & (columns < ROT_DIM // 2)
        tl.store(target + columns, first.to(dtype), mask=mask)
        tl.store(target + ROT_DIM // 2 + columns, second.to(dtype), mask=mask)
