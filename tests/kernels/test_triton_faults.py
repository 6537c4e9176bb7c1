"""Faults planted into the real kernels: their proofs must find every one, or they prove nothing."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests.kernels.proof.checks import Case, Proof, check_case
from tests.kernels.proof.memory import OutOfBounds, Race
from tests.kernels.proof.registry import PROOFS

Fault = tuple[str, str, str]

FAULTS: dict[str, list[Fault]] = {
    "rms_norm": [
        ("mask of rows missing", "(rows < num_rows) & (columns < HIDDEN)", "columns < HIDDEN"),
        ("mask of columns missing", "(rows < num_rows) & (columns < HIDDEN)", "(rows < num_rows) & (columns < BLOCK)"),
        ("mean over the padded row", "/ HIDDEN + eps", "/ columns.shape[1] + eps"),
        ("sum of bfloat16 squares", "tl.sum(wide * wide", "tl.sum((wide * wide).to(tl.bfloat16).to(tl.float32)"),
        ("stride forgotten", "rows * x_stride", "rows * HIDDEN"),
        ("rows overlap", "* ROWS + tl", "* (ROWS - ROWS // 2) + tl"),
        ("last row forgotten", "rows < num_rows", "rows < num_rows - 1"),
        ("offset of weights forgotten", ".to(tl.float32) + weight_offset", ".to(tl.float32)"),
        ("row read twice", "normed = normalized(wide,", "normed = normalized(tl.load(x + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32),"),  # noqa: E501
    ],
    "add_rms_norm": [
        ("norm of the other operand", "normalized(total.to(tl.float32),", "normalized(before,"),
        ("residual stride forgotten", "rows * residual_stride", "rows * x_stride // x_stride * HIDDEN"),
        ("new residual not stored", "tl.store(new_residual + rows * HIDDEN + columns, total, mask=mask)", "pass"),
    ],
    "gated_mul": [
        ("gate and up exchanged", "activated * up", "up / (1.0 + tl.exp(-up)) * gate"),
        ("columns not masked", "mask = columns < SIZE", "mask = columns < BLOCK * 4"),
        ("blocks overlap", "tl.program_id(1) * BLOCK +", "tl.program_id(1) * (BLOCK - 16) +"),
        ("product of rounded numbers", "activated * up", "activated.to(tl.float8e5).to(tl.float32) * up"),
        ("gate not clamped", "tl.where(gate > 7.0, 7.0, gate)", "gate"),
        ("up clamped on one side", "tl.where(up < -7.0, -7.0, up)", "up"),
    ],
    "rope_kv_write": [
        ("wrong page", "slot // BLOCK_SIZE * block_stride", "(slot // BLOCK_SIZE + 1) * block_stride"),
        ("page beside the cache", "slot // BLOCK_SIZE * block_stride", "(slot // BLOCK_SIZE + 1000) * block_stride"),
        ("wrong place in the page", "slot % BLOCK_SIZE * slot_stride", "(slot + 1) % BLOCK_SIZE * slot_stride"),
        ("position off by one", "tl.load(position) *", "(tl.load(position) + 1) *"),
        ("turned backwards", "first * cos - second * sin, second * cos + first", "first * cos + second * sin, second * cos - first"),  # noqa: E501
        ("V is turned into K", "row + (NUM_HEADS + NUM_KV_HEADS + heads)", "row + (NUM_HEADS + heads)"),
        ("heads not masked", "heads < NUM_HEADS,", "heads < NUM_HEADS + 1,"),
        ("scale of the first half only", "tl.maximum(tl.abs(first), tl.abs(second))", "tl.abs(first)"),
        ("scale not stored for V", "tl.store(v_scales + scale_place", "tl.store(k_scales + scale_place"),
        ("scale in the wrong place", "slot % BLOCK_SIZE * scale_slot_stride", "0 * scale_slot_stride"),
        ("zeros divided by zero", "tl.where(largest > 0.0, largest / 448.0, 1.0)", "largest / 448.0"),
        ("rest not scaled", "second / factor, others / factor", "second / factor, others"),
        ("rest not normed", "others *= scale", "others *= 0 * scale + 1"),
        ("rest not written", "mask=rest_mask)\n\n\n@triton.jit\ndef scale_of", "mask=rest_mask & (rest < 0))\n\n\n@triton.jit\ndef scale_of"),  # noqa: E501
    ],
    "linear": [
        ("last block of K forgotten", "range(first, end, BLOCK)", "range(first, end - BLOCK, BLOCK)"),
        ("K not masked", "if K % BLOCK == 0", "if K > 0"),
        ("rows beyond the end", "tl.minimum(tokens, num_tokens - 1)", "tokens"),
        ("weights beyond the end", "tl.minimum(outputs, num_outputs - 1)", "outputs"),
        ("a span forgotten", "tl.static_range(1, SPANS)", "tl.static_range(2, SPANS)"),
        ("all spans to one place", "y += tl.program_id(1)", "y += 0 * tl.program_id(1)"),
        ("bias for every span", "None if splits else bias", "bias"),
        ("tiles beyond the end", "GROUP_SIZE)\n    within", "GROUP_SIZE) + 1\n    within"),
        ("spans overlap", "tl.minimum(first + SPAN, K), K, OUTPUTS", "tl.minimum(first + SPAN + 64, K), K, OUTPUTS"),
    ],
    "route": [
        ("ties to the higher id", "(65535 - index)", "index"),
        ("minus zero below zero", 'float("-inf")) + 0.0', 'float("-inf"))'),
        ("negative numbers turned around", "bits ^ 0x7FFFFFFF", "bits"),
        ("chosen again", "keys = tl.where(is_best, -1, keys)", "pass"),
        ("softmax over the padding", "tl.where(exists, tl.exp", "tl.where(exists | True, tl.exp"),
        ("weights with the bias", "tl.where(is_best, scores, 0.0)", "tl.where(is_best, choice, 0.0)"),
        ("worth of the best alone", "worth += tl.max(", "worth += 0 * tl.max("),
        ("one group too many", "tl.static_range(NUM_CHOSEN_GROUPS)", "tl.static_range(NUM_CHOSEN_GROUPS + 1)"),
        ("scale forgotten", "chosen_scores * scale", "chosen_scores"),
        ("tokens not masked", "mask = exists & (tokens < num_tokens)[:, None, None]", "mask = exists & (tokens >= 0)[:, None, None]"),  # noqa: E501
    ],
    "experts": [
        ("wrong expert", "expert.to(tl.int64) * (2 * num_outputs)", "0 * expert.to(tl.int64) * (2 * num_outputs)"),
        ("gate and up exchanged", "gated(gate, up, ACTIVATION)", "gated(up, gate, ACTIVATION)"),
        ("bias of another expert", "bias += expert * num_outputs", "bias += 0 * expert"),
        ("bias of the gate for both", "tl.load(gate_bias + num_outputs,", "tl.load(gate_bias,"),
        ("a choice taken for its token", "// NUM_CHOSEN\n", "\n"),
        ("columns beyond the end", "tl.minimum(places, end - 1))", "places)"),
        ("a tile writes into the next expert's", "(places < end)[:, None]", "(places < end + 1)[:, None]"),
        ("the rest of an expert forgotten", "(counts + columns - 1) // columns", "counts // columns"),
        ("tiles overlap", "(tile - first_tile) * columns", "(tile - first_tile) * (columns - 1)"),
        ("surplus tiles of somebody", "tile < max_tiles, max_tiles, -1,", "tile < max_tiles, max_tiles, 0,"),
        ("nobody's choices not marked", "place * 0 - 1,", "place * 0,"),
        ("ids beyond the experts", "(ids >= 0) & (ids < NUM_EXPERTS)", "ids >= 0"),
        ("K not masked", "if K % BLOCK == 0", "if K > 0"),
        ("weights forgotten", "tl.where(place >= 0, weight, 0.0)", "1.0"),
        ("a choice forgotten", "tl.static_range(NUM_CHOSEN)", "tl.static_range(NUM_CHOSEN // 2)"),
        ("the last tile of outputs", "tl.minimum(outputs, num_outputs - 1)", "outputs"),
    ],
    "quantized_linear": [
        ("zeros forgotten", "(numbers - zero) * scale", "numbers * scale"),
        ("nibbles exchanged", "(words >> 8) & 0x000F000F", "(words >> 4) & 0x000F000F"),
        ("bytes exchanged", "(words >> 16) & 255", "(words >> 8) & 255"),
        ("sign of float8 forgotten", "(bytes & 128) << 8 |", ""),
        ("wrong bias of float8's exponent", "* 256.0", "* 128.0"),
        ("second block of a turn forgotten", "tl.static_range(0, STEP, BLOCK)", "tl.static_range(0, BLOCK, BLOCK)"),
        ("one scale a turn for small groups", "SCALE_INPUTS % STEP != 0", "SCALE_INPUTS == 0"),
        ("one scale for both halves of a block", "tl.arange(0, 2) * (BLOCK // 2)", "tl.arange(0, 2) * 0"),
        ("groups beyond the end", "(K - 1) // SCALE_INPUTS", "(K - 1) // SCALE_INPUTS + 1"),
        ("a scale for each row of a block", "rows // SCALE_OUTPUTS * scale_stride", "rows * scale_stride"),
        ("order of the inputs forgotten", "x = x.index_select(1, weight.input_order)", "pass"),
        ("weights beyond the end", "rows = tl.minimum(outputs, num_outputs - 1)", "rows = outputs"),
        ("wrong tile of outputs", "(rows // BLOCK).to(tl.int64) *", "(rows // BLOCK).to(tl.int64) * 0 *"),
        ("K not masked", "tl.load(x_rows + k) if K % BLOCK == 0", "tl.load(x_rows + k) if K > 0"),
        ("all spans to one place", "y += tl.program_id(1)", "y += 0 * tl.program_id(1)"),
        ("bias for every span", "None if splits else bias", "bias"),
        ("dequantised rows cut off", "(outputs < num_outputs)[:, None] & (k < K)", "(outputs < num_outputs - 1)[:, None] & (k < K)"),  # noqa: E501
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Planted:
    """A proof whose operation has a fault."""

    proof: Proof
    fault: Fault


PLANTED = [
    pytest.param(Planted(proof, fault), id=f"{proof.name}: {fault[0]}")
    for proof in PROOFS
    # Where an operation is more than one file, function or launch, its faults are planted in a test of its own.
    if proof.name not in ("paged_attention", "all_reduce_add_rms_norm", "step_inputs")
    for fault in FAULTS[proof.name]
]


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found(planted: Planted, tmp_path: Path) -> None:
    name, right, wrong = planted.fault
    proof = planted.proof
    original = Path(str(importlib.util.find_spec(proof.operation.__module__).origin))  # type: ignore[union-attr]
    source = original.read_text()
    assert source.count(right) >= 1, f"{name}: the kernel does not say {right!r} any more"
    path = tmp_path / f"{proof.name}_with_a_fault.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    faulty = replace(proof, operation=getattr(module, proof.name))
    assert any(_is_found(faulty, case) for case in proof.cases), f"nobody noticed: {name}"


def _is_found(faulty: Proof, case: Case) -> bool:
    try:
        check_case(faulty, case)
    except (AssertionError, OutOfBounds, Race):
        return True
    return False


def test_a_right_kernel_passes_so_that_failing_means_something() -> None:
    torch.manual_seed(0)
    for proof in PROOFS:
        assert not _is_found(proof, proof.cases[-1])
