"""`rope_kv_write` against its reference: what it returns and what it leaves in the caches."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmd_kernels import rope_kv_write
from llmd_kernels.rope_kv_write import reference
from tests.kernels.conftest import threads

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 6, 2, 16, 4


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def caches(dtype: torch.dtype, num_blocks: int = 80) -> tuple[Tensor, Tensor]:
    """Poisoned: what nobody writes stays NaN."""
    k_cache = torch.full((num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM), torch.nan, dtype=dtype)
    return k_cache, k_cache.clone()


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 257])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rot_dim", "norms"), [(16, "qk"), (8, ""), (0, "q"), (16, "k"), (4, "qk")])
def test_equals_the_reference(num_tokens: int, interleaved: bool, rot_dim: int, norms: str) -> None:
    qkv = randn(num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    slots = torch.randperm(80 * BLOCK_SIZE, generator=torch.Generator().manual_seed(1))[:num_tokens]
    options: dict[str, Any] = {
        "positions": torch.arange(num_tokens).flip(0) * 3,
        "slots": slots,
        "num_heads": NUM_HEADS,
        "num_kv_heads": NUM_KV_HEADS,
        "interleaved": interleaved,
        "norm_eps": 1e-5,
        "norm_weight_offset": 1.0,
    }
    angles = randn(800, rot_dim) if rot_dim else None
    q_norm = randn(HEAD_DIM, seed=2) if "q" in norms else None
    k_norm = randn(HEAD_DIM, seed=3) if "k" in norms else None
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        k_cache, v_cache = caches(dtype)
        k_expected, v_expected = caches(torch.float64)
        q = rope_kv_write(
            qkv.to(dtype), k_cache=k_cache, v_cache=v_cache, cos_sin=angles, q_norm=q_norm, k_norm=k_norm, **options
        )
        q_expected = reference.rope_kv_write(
            qkv, k_cache=k_expected, v_cache=v_expected, cos_sin=angles, q_norm=q_norm, k_norm=k_norm, **options
        )
        assert q.dtype == dtype
        assert q.shape == (num_tokens, NUM_HEADS, HEAD_DIM)
        for result, expected in ((q, q_expected), (k_cache, k_expected), (v_cache, v_expected)):
            torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_rotation_by_hand() -> None:
    """A quarter turn at position 1, none at 0."""
    qkv = torch.tensor([[1.0, 2.0, 3.0, 4.0] * 3] * 2)
    cos_sin = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    for interleaved, turned in ((False, [-3.0, -4.0, 1.0, 2.0]), (True, [-2.0, 1.0, -4.0, 3.0])):
        k_cache, v_cache = torch.zeros(2, 1, 2, 4), torch.zeros(2, 1, 2, 4)
        q = rope_kv_write(
            qkv,
            positions=torch.tensor([0, 1]),
            slots=torch.tensor([3, 0]),
            k_cache=k_cache,
            v_cache=v_cache,
            num_heads=1,
            num_kv_heads=1,
            cos_sin=cos_sin,
            interleaved=interleaved,
        )
        assert q[:, 0].tolist() == [[1.0, 2.0, 3.0, 4.0], turned]
        assert k_cache[:, 0].tolist() == [[turned, [0.0] * 4], [[0.0] * 4, [1.0, 2.0, 3.0, 4.0]]]
        assert v_cache[0, 0, 0].tolist() == v_cache[1, 0, 1].tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_padding_leaves_all_but_the_last_slot_alone(dtype: torch.dtype) -> None:
    qkv, slots = randn(3, 10 * HEAD_DIM).float(), torch.tensor([2, -1, -1])
    k_cache, v_cache = caches(dtype, num_blocks=2)
    k_scales, v_scales = torch.full((2, 2, NUM_KV_HEADS, BLOCK_SIZE), torch.nan).unbind(0)
    rope_kv_write(
        qkv,
        positions=torch.zeros(3, dtype=torch.int64),
        slots=slots,
        k_cache=k_cache,
        v_cache=v_cache,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        cos_sin=None,
        k_scales=k_scales if dtype.itemsize == 1 else None,
        v_scales=v_scales if dtype.itemsize == 1 else None,
    )
    for cache in (k_cache, v_cache):
        written = cache.float().isfinite().all(dim=3).all(dim=1).flatten()
        assert [place for place, is_written in enumerate(written[:-1]) if is_written] == [2]


def test_caches_of_another_dtype_hold_the_rounded_values() -> None:
    qkv = randn(5, 10 * HEAD_DIM).float()
    written = []
    for dtype in (torch.float32, torch.bfloat16):
        k_cache, v_cache = caches(dtype, num_blocks=2)
        rope_kv_write(
            qkv,
            positions=torch.arange(5),
            slots=torch.arange(5),
            k_cache=k_cache,
            v_cache=v_cache,
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            cos_sin=randn(9, HEAD_DIM).float(),
        )
        written.append((k_cache, v_cache))
    for wide, narrow in zip(*written, strict=True):
        assert torch.equal(wide.bfloat16()[:1], narrow[:1])


def test_bits_of_a_token_do_not_depend_on_the_others() -> None:
    num_tokens, num_heads, num_kv_heads, head_dim = 200, 9, 3, 64
    qkv = randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).float()
    angles, norm = randn(300, head_dim).float(), randn(head_dim, seed=1).float()

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        positions = torch.arange(num_tokens)[rows]
        k_cache, v_cache = torch.zeros(2, 50, num_kv_heads, 16, head_dim).unbind(0)
        q = rope_kv_write(
            qkv[rows],
            positions=positions,
            slots=positions,
            k_cache=k_cache,
            v_cache=v_cache,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            cos_sin=angles,
            q_norm=norm,
            k_norm=norm,
            norm_eps=1e-6,
        )
        return q, k_cache.transpose(1, 2).flatten(0, 1)[positions]

    q, k = run(slice(None))
    for rows in (slice(0, 1), slice(3, 10), slice(17, 120), slice(8, 200)):
        q_part, k_part = run(rows)
        assert torch.equal(q_part, q[rows])
        assert torch.equal(k_part, k[rows])
    with threads(2):
        assert torch.equal(run(slice(None))[0], q)


def test_float8_caches_hold_each_token_with_a_scale_of_its_own() -> None:
    k_cache, v_cache = caches(torch.float8_e4m3fn, num_blocks=3)
    k_scales, v_scales = (
        torch.full((3, NUM_KV_HEADS, BLOCK_SIZE), torch.nan),
        torch.full((3, NUM_KV_HEADS, BLOCK_SIZE), torch.nan),
    )
    qkv = randn(3, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM).float() * torch.tensor([[1e-6], [1.0], [1e4]])
    qkv[1, -HEAD_DIM:] = 0
    slots = torch.tensor([7, 0, 5])
    rope_kv_write(
        qkv,
        positions=torch.arange(3),
        slots=slots,
        k_cache=k_cache,
        v_cache=v_cache,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        cos_sin=None,
        k_scales=k_scales,
        v_scales=v_scales,
    )
    kv = qkv.view(3, -1, HEAD_DIM)[:, NUM_HEADS:]
    for cache, scales, heads in ((k_cache, k_scales, kv[:, :NUM_KV_HEADS]), (v_cache, v_scales, kv[:, NUM_KV_HEADS:])):
        read = (cache.float() * scales[..., None]).transpose(1, 2).flatten(0, 1)[slots]
        # half a step of three bits of mantissa, or of the smallest numbers, beside each head's largest
        assert torch.all((read - heads).abs() <= heads.abs() / 16 + heads.abs().amax(-1, keepdim=True) * 2**-9 / 448)
        assert scales.isnan().sum() == scales.numel() - 3 * NUM_KV_HEADS
