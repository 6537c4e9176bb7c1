"""Faults planted into the real kernels: their proofs must find every one, or they prove nothing."""

import importlib
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
        ("padding written", "is_kept = slot >= 0", "is_kept = slot >= -1"),
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
        ("bias for every span", "None if launched.splits else bias", "bias"),
        ("tiles beyond the end", "GROUP_SIZE)\n    within", "GROUP_SIZE) + 1\n    within"),
        ("spans overlap", "end = tl.minimum(first + SPAN, K)", "end = tl.minimum(first + SPAN + 64, K)"),
        ("a descriptor's rows", "output_tile * OUTPUTS, token_tile * TOKENS", "output_tile * OUTPUTS, token_tile * OUTPUTS"),  # noqa: E501
        ("a descriptor where rows are apart", "rows.stride(0) * rows.itemsize % 16 == 0", "rows.stride(0) >= 0"),
        ("a descriptor of other rows", "list(rows.stride())", "[rows.shape[1], 1]"),
    ],
    "route": [
        ("padding chooses", "other=-1) >= 0", "other=-1) >= -1"),
        ("ties to the higher id", "(65535 - index)", "index"),
        ("minus zero below zero", 'float("-inf")) + 0.0', 'float("-inf"))'),
        ("negative numbers turned around", "bits ^ 0x7FFFFFFF", "bits"),
        ("chosen again", "keys = tl.where(is_best, -1, keys)", "pass"),
        ("softmax over the padding", "tl.where(exists, tl.exp", "tl.where(exists | True, tl.exp"),
        ("weights with the bias", "tl.where(is_best, scores, 0.0)", "tl.where(is_best, choice, 0.0)"),
        ("worth of the best alone", "worth += tl.max(", "worth += 0 * tl.max("),
        ("one group too many", "tl.static_range(NUM_CHOSEN_GROUPS)", "tl.static_range(NUM_CHOSEN_GROUPS + 1)"),
        ("scale forgotten", "chosen_scores *= scale", "chosen_scores *= 1.0"),
        ("tokens not masked", "mask = exists & (tokens < num_tokens)[:, None, None]", "mask = exists & (tokens >= 0)[:, None, None]"),  # noqa: E501
    ],
    "experts": [
        ("wrong expert", "expert.to(tl.int64) * (2 * num_outputs)", "0 * expert.to(tl.int64) * (2 * num_outputs)"),
        ("wrong expert, quantised", "rows += expert * (2 * num_outputs)", "rows += 0 * expert"),
        ("wrong expert's down, quantised", "rows += expert * num_outputs", "rows += 0 * expert"),
        ("the gate for up too", "rows + num_outputs, x_rows", "rows, x_rows"),
        ("a scale for each row of a block", "rows // SCALE_OUTPUTS * scale_stride", "rows * scale_stride"),
        ("a part of K", "weight_rows, scale_rows, x_rows, 0, K,", "weight_rows, scale_rows, x_rows, 0, K // 2,"),
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
        ("sign of MXFP4 forgotten", "((codes & 0x00080008) << 12) |", ""),
        ("wrong bias of MXFP4's exponent", "2.0**bias", "2.0 ** (bias - 1)"),
        ("MXFP4's exponents of float32 too high", "exponent << 23", "(exponent + 1) << 23"),
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
    "scale_logits": [
        ("not divided", "products = products / divisor", "pass"),
        ("cap forgotten behind", "tanh(products / soft_cap) * soft_cap", "tanh(products / soft_cap)"),
        ("numbers beyond the end", "mask = places < size", "mask = places < size + 1"),
        ("blocks overlap", ".to(tl.int64) * BLOCK", ".to(tl.int64) * (BLOCK - 1)"),
        ("cap for all", "CAPS=soft_cap is not None", "CAPS=True"),
    ],
    "linear_draw": [
        ("best beyond the end", "(token_ids < num_tokens)[None, :]", "(token_ids < num_tokens + 5)[None, :]"),
        ("rows beyond the end", "tl.minimum(rows, num_rows - 1)", "rows"),
        ("one span only", "range(SPAN, K, SPAN)", "range(K, K, SPAN)"),
        ("noise of other tokens", "groups = token_tile * (TOKENS // 4)", "groups = (token_tile + 1) * (TOKENS // 4)"),
        ("noise of one row for all", "seed[:, None]", "tl.max(seed, axis=0)"),
        ("not divided", "DIVIDES=divisor != 1", "DIVIDES=False"),
        ("results of other tiles", "* best_stride + token_tile\n", "* best_stride\n"),
        ("bounds of rows", "row_mask = rows < num_rows", "row_mask = rows < num_rows + 1"),
    ],
    "sample_on_device": [
        ("the last chunk forgotten", "scan_kernel[(num_rows, num_chunks)]", "scan_kernel[(num_rows, max(1, num_chunks - 1))]"),  # noqa: E501
        ("noise of chunk 0", "groups = chunk * (TOKENS // 4)", "groups = 0 * (TOKENS // 4)"),
        ("words exchanged", "tl.join(word0, word2), tl.join(word1, word3)", "tl.join(word0, word1), tl.join(word2, word3)"),  # noqa: E501
        ("words of single tokens exchanged", "ids % 4 == 1, word1, word3", "ids % 4 == 1, word3, word1"),
        ("highest of equal ids", "tl.min(tl.where(scores == best, ids, 2147483647)", "tl.max(tl.where(scores == best, ids, -1)"),  # noqa: E501
        ("equal ones in the wrong order", "+ (1048575 - ids)", "+ ids"),
        ("negative logits in the wrong order", "bits ^ ((bits >> 31) & 0x7FFFFFFF)", "bits"),
        ("top_p before top_k", "if top_k > 0:\n        kept = kept & (num_ahead < top_k)\n        total", "if top_k > 0:\n        kept = kept & (num_ahead < top_k)\n        _"),  # noqa: E501
        ("the crossing token dropped", "units_ahead < wanted_units(total, top_p)", "units_ahead + units_of(weights) < wanted_units(total, top_p)"),  # noqa: E501
        ("min_p forgotten", "kept = weights >= min_p\n", "kept = weights >= 0.0\n"),
        ("bisected too far", "low, high = tl.where(enough, middle, low)", "low, high = tl.where(enough, middle + 1, low)"),  # noqa: E501
        ("candidates to the same places", "first + tl.cumsum(found.to(tl.int32), axis=0) - 1", "tl.cumsum(found.to(tl.int32), axis=0) - 1"),  # noqa: E501
        ("candidates beyond their room", "found & (place < CANDIDATES)", "found"),
        ("a guess that is not checked", "complete = num <= CANDIDATES", "complete = num >= 0"),
        ("penalties before biases", "score += tl.where(ids == tl.load(bias_ids + entry)", "score -= tl.where(ids == tl.load(bias_ids + entry)"),  # noqa: E501
        ("prompt counted as output", "tokens, num_prompt, num_all", "tokens, 0, num_all"),
        ("output not repeated", "in_prompt + in_output > 0", "in_prompt > 0"),
        ("tokens of another place", "tl.load(places + row).to(tl.int64) * history_stride", "row * history_stride"),
        ("bits in the wrong order", "words >> (ids % 32)", "words >> (31 - ids % 32)"),
        ("counted beyond the end", "(index >= start) & (index < end)", "index >= start"),
        ("counted before the start", "(index >= start) & (index < end)", "index < end"),
        ("read beyond the history", "tl.minimum(tl.cdiv(end, 4) * 4, history_len)", "tl.cdiv(end, 4) * 4"),
        ("raw logits instead of scores", "found = tl.load(scores + row * num_tokens + ids, mask", "found = tl.load(logits + row * logits_stride + ids, mask"),  # noqa: E501
    ],
    "top_tokens": [
        ("the last chunk forgotten", "triton.cdiv(num_tokens, CHUNK)", "max(1, num_tokens // CHUNK)"),
        ("the first chunk for all", "ids = tl.program_id(1) * TOKENS", "ids = 0 * tl.program_id(1) * TOKENS"),
        ("logits beyond the end", "mask=ids < num_tokens, other", "mask=ids < num_tokens + 1, other"),
        ("stride forgotten", "row * logits_stride", "row * num_tokens"),
        ("the same entry again", 'tl.where(taken, float("-inf"), values)', "values"),
        ("what is taken comes back", "tl.where(taken, 2147483647, ids)", "ids"),
        ("chunks in each other's place", "+ tl.program_id(1)) * k", "+ tl.program_id(1)) * (k - 1)"),
        ("entries beyond the end", "mask = entries < num_entries", "mask = entries < num_entries + 1"),
        ("one too few", "for rank in range(k):", "for rank in range(k - 1):"),
        ("ids of chunks", "ids = tl.load(chunk_ids + row * num_entries + entries, mask=mask, other=2147483647)", "ids = entries"),  # noqa: E501
        ("all ids to one place", "tl.store(top_ids + place + rank", "tl.store(top_ids + place"),
    ],
    "token_logprobs_on_device": [
        ("the last chunk forgotten", "triton.cdiv(num_tokens, CHUNK)", "max(1, num_tokens // CHUNK)"),
        ("logits beyond the end", "mask=ids < num_tokens, other", "mask=ids < num_tokens + 1, other"),
        ("stride forgotten", "row * logits_stride + ids", "row * num_tokens + ids"),
        ("equal ones behind are ahead", "(ids < token_id)", "(ids != token_id)"),
        ("ids of the first chunk", "ids = chunk * TOKENS + tl.arange", "ids = tl.arange"),
        ("the best has rank 0", "better + 1", "better"),
        ("masses of different units", "mass * tl.exp(of_chunks - largest)", "mass"),
        ("too large to be summed", "tl.exp(score - largest)", "tl.exp(score)"),
        ("a chunk of nothing", 'tl.where(score > float("-inf"), tl.exp(score - largest), 0.0)', "tl.exp(score - largest)"),  # noqa: E501
        ("too small to be seen", "chosen - largest - log_mass", "chosen - (largest + log_mass)"),
        ("chunks of a neighbour", "row * tl.num_programs(1) + chunk", "row + chunk"),
        ("another row's token", "logits + row * logits_stride + token_id", "logits + token_id"),
        ("logits instead of logarithms", "top_values.float() - largest[:, None] -", "top_values.float() -"),
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
def test_a_planted_fault_is_found(planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, right, wrong = planted.fault
    proof = planted.proof
    module = proof.operation.__module__
    folder = Path(str(importlib.util.find_spec(module).origin)).parent  # type: ignore[union-attr]
    sources = {path.name: path.read_text() for path in folder.glob("triton_*.py")}
    assert any(right in source for source in sources.values()), f"{name}: the kernel does not say {right!r} any more"
    # All of an operation's kernels, in a package that imports its own.
    package = tmp_path / f"faulty_{tmp_path.name}"
    package.mkdir()
    for file, source in sources.items():
        own = source.replace(f"{module.rpartition('.')[0]}.triton_", f"{package.name}.triton_")
        (package / file).write_text(own.replace(right, wrong))
    monkeypatch.syspath_prepend(tmp_path)
    faulty_module = importlib.import_module(f"{package.name}.{module.rpartition('.')[2]}")
    faulty = replace(proof, operation=getattr(faulty_module, proof.name))
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
