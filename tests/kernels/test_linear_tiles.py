"""Which tile `linear` has for many tokens, and that none of them changes a bit."""

import importlib.util
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmd_kernels.linear.tiles import DEVICES, MASKED, Tile, candidates, cycles, find_tile

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is built for Linux alone", allow_module_level=True)

from llmd_kernels.linear import triton_ops
from tests.kernels.proof.inputs import apart, randn
from tests.kernels.proof.interpreter import interpreted

# (inputs, outputs) of Llama-3.1-8B: fused qkv, output, gate and up, down.
SHAPES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
TILES = {tile for device in DEVICES.values() for tile in (*device.tiles, *device.tiles_of_two_sums, MASKED)}


def chosen(num_tokens: int, num_inputs: int, num_outputs: int, *, arch: str = "sm_90", **options: int) -> Tile:
    span = triton_ops.span_of(num_outputs, num_inputs)
    return find_tile(num_tokens, num_inputs, num_outputs, span=span, device=DEVICES[arch], **options)


@given(st.sampled_from(sorted(DEVICES)), st.integers(65, 9000), st.integers(1, 300), st.integers(1, 2000))
def test_all_numbers_up_to_a_power_of_two_have_one_tile(arch: str, num_tokens: int, blocks: int, rows: int) -> None:
    """What is compiled before a model serves counts on it."""
    largest = 1 << (num_tokens - 1).bit_length()
    shape = blocks * triton_ops.BLOCK_K, rows * 8
    assert chosen(num_tokens, *shape, arch=arch) == chosen(largest, *shape, arch=arch)


@given(st.sampled_from(sorted(DEVICES)), st.integers(65, 9000), st.integers(1, 300), st.integers(1, 2000))
def test_only_proven_tiles_are_chosen(arch: str, num_tokens: int, blocks: int, rows: int) -> None:
    num_inputs, num_outputs = blocks * triton_ops.BLOCK_K, rows * 8
    tile = chosen(num_tokens, num_inputs, num_outputs, arch=arch)
    has_spans = triton_ops.span_of(num_outputs, num_inputs) < num_inputs
    assert tile in candidates(DEVICES[arch], has_spans=has_spans)


def test_small_tiles_where_large_ones_would_leave_processors_idle() -> None:
    few, many = (chosen(256, 4096, 4096, num_processors=number) for number in (8, 132))
    assert few.outputs * few.tokens > many.outputs * many.tokens
    num_programs = -(-256 // many.tokens) * -(-4096 // many.outputs)
    assert num_programs * (1 + many.splits) > 0.9 * 132


@pytest.mark.parametrize("num_tokens", [1024, 2048, 8192])
def test_prompts_reach_the_goal_by_arithmetic(num_tokens: int) -> None:
    """615 TFLOP/s over the products of a layer: 25 ms for the first token of 1,024. At 1.7 GHz; not a measurement."""
    device = DEVICES["sm_90"]
    seconds = (
        sum(
            cycles(chosen(num_tokens, *shape), (num_tokens, *shape), triton_ops.span_of(shape[1], shape[0]), device)
            for shape in SHAPES
        )
        / 1.7e9
    )
    operations = sum(2 * num_tokens * num_inputs * num_outputs for num_inputs, num_outputs in SHAPES)
    assert 615e12 < operations / seconds < 800e12


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("splits", [False, True], ids=["one program", "programs for spans"])
def test_no_tile_changes_a_bit(splits: bool, descriptors: bool) -> None:
    x, weight = randn(66, 1024, dtype=torch.bfloat16), randn(40, 1024, dtype=torch.bfloat16, seed=1)
    assert triton_ops.span_of(40, 1024) < 1024
    with interpreted():
        expected = torch.cat([triton_ops.linear(rows, weight) for rows in x.split(33)])
    for shape in {(tile.outputs, tile.tokens) for tile in TILES}:
        tile = Tile(*shape, num_warps=8, num_stages=3, splits=splits, descriptors=descriptors)
        with patch.object(triton_ops, "tile_of_launch", lambda *_, tile=tile, **__: tile), interpreted(shuffle=1):
            assert torch.equal(triton_ops.linear(x, weight), expected), shape


@pytest.mark.parametrize(("gap", "expected"), [(8, True), (1, False)])
def test_descriptors_only_where_they_can_point(gap: int, expected: bool) -> None:
    with interpreted() as launches:
        triton_ops.linear(apart(randn(70, 64, dtype=torch.bfloat16), gap), randn(16, 64, dtype=torch.bfloat16))
    assert [launch.arguments["DESCRIPTORS"] for launch in launches] == [expected]
