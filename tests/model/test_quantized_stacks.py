"""Stacks of experts stay quantised as dense weights do: the same numbers, the same results, the planned memory."""

import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from llmd.errors import UnsupportedModel
from llmd.model import checkpoint, dummy
from llmd.model.checkpoint import load_decoder, load_without_memory
from llmd.model.dummy import dummy_quantized
from llmd.model.memory import dequantized_bytes, weight_bytes
from llmd.model.moe import Moe
from llmd.model.parallel import Parameter, Rank, whole
from llmd.model.parameters import parameters
from llmd.model.quantization import WeightScheme
from llmd.model.quantized_layouts import kept_parameters
from llmd.model.quantized_packing import packed
from llmd.model.quantized_weights import UnpackedWeight
from llmd.model.spec import load_spec
from llmd_kernels import Float8Weight, IntWeight, dequantized
from tests.model.kept_weights import CPU, ONE_RANK, load_dequantized, load_kept, nbytes, num_bytes
from tests.model.paged_steps import hidden_in_one_step, logits_in_one_step
from tests.model.quantized_checkpoints import CASES, FP8_CONFIG, float8_case, write_quantized
from tests.model.reference_models import make_reference, save_reference
from tests.model.test_checkpoint import edit_tensors
from tests.model.test_quantized_checkpoints import SEQUENCES, plain_copy

SIZES = {
    "hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32,
    "num_experts_per_tok": 2,
}  # fmt: skip
# 96 rows of a gate or an up are no whole tiles, and no whole blocks of 64 or 128
MODELS = {
    "mixtral": SIZES | {"num_local_experts": 5, "intermediate_size": 96},
    "qwen3_moe": SIZES | {"num_experts": 4, "moe_intermediate_size": 128, "norm_topk_prob": True},
}
KEPT = [
    "awq", "gptq, 4 bits", "gptq, 8 bits, rows, head", "pack-quantized, 4 bits, asymmetric", "int-quantized",
    "fp8, blocks", "fp8, small blocks", "fp8, one scale", "fbgemm_fp8",
]  # fmt: skip
STACKS = [f"layers.{index}.experts.{name}.weight" for index in (0, 1) for name in ("gate_up", "down")]
G_IDX = "block_sparse_moe.experts.2.w2.g_idx"


def quantized_folder(model_type: str, case: str, tmp_path: Path) -> Path:
    folder = save_reference(make_reference(model_type, MODELS[model_type]), tmp_path / "reference")
    way = CASES[case]
    if way.config["quant_method"] == "compressed-tensors":
        # its tools name every exception, the routers too
        way = replace(way, config=way.config | {"ignore": ["lm_head", r"re:.*\.gate$"]})
    write_quantized(folder, tmp_path / "quantized", way)
    return tmp_path / "quantized"


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("case", KEPT)
def test_the_same_as_dequantized(case: str, model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantized_folder(model_type, case, tmp_path)
    everything = load_dequantized(folder, torch.bfloat16)
    weights, quantized = load_kept(folder, torch.bfloat16)
    assert set(STACKS) <= quantized.keys()
    for name in STACKS:
        assert torch.equal(dequantized(quantized[name], torch.bfloat16), everything[name].flatten(0, 1)), name
    assert num_bytes(weights, quantized) == weight_bytes(load_spec(folder), dtype_bytes=2, keeps_quantized=True)

    expected = load_decoder(folder, dtype=torch.bfloat16, device=CPU)
    monkeypatch.setattr(checkpoint, "has_quantized_kernels", lambda **_: True)
    decoder = load_decoder(folder, dtype=torch.bfloat16, device=CPU)
    for layer in decoder._layers:
        assert isinstance(layer.mlp, Moe)
        assert isinstance(layer.mlp.gate_up, IntWeight | Float8Weight)
        assert isinstance(layer.mlp.down, IntWeight | Float8Weight)
    assert torch.equal(hidden_in_one_step(decoder, SEQUENCES), hidden_in_one_step(expected, SEQUENCES))


@pytest.mark.parametrize("case", ["awq", "gptq, 4 bits, shuffled", "fp8, blocks"])
def test_where_there_are_no_kernels_stacks_are_dequantized(case: str, tmp_path: Path) -> None:
    """The router is never quantised."""
    folder = save_reference(make_reference("qwen3_moe", MODELS["qwen3_moe"]), tmp_path / "reference")
    weights = write_quantized(folder, tmp_path / "quantized", CASES[case])
    logits, expected = (
        logits_in_one_step(load_decoder(there, dtype=torch.float32, device=CPU), SEQUENCES)
        for there in (tmp_path / "quantized", plain_copy(folder, weights, tmp_path / "plain"))
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))


def test_what_no_kernel_knows_is_dequantized(tmp_path: Path) -> None:
    """Inputs in another order, groups of 16, 33 float8 inputs, a stack of which one matrix is plain. Other weights are
    not concerned.
    """
    _, shuffled = load_kept(quantized_folder("mixtral", "gptq, 4 bits, shuffled", tmp_path / "a"), torch.bfloat16)
    assert shuffled.keys() == {f"layers.{index}.{name}.weight" for index in (0, 1) for name in ("qkv", "o")}

    small = CASES["awq, small groups, some layers plain"]
    small = replace(small, plain=(), config=small.config | {"modules_to_not_convert": None})
    folder = save_reference(make_reference("mixtral", MODELS["mixtral"]), tmp_path / "reference")
    write_quantized(folder, tmp_path / "b", small)
    assert not load_kept(tmp_path / "b", torch.bfloat16)[1]

    odd = save_reference(make_reference("mixtral", MODELS["mixtral"] | {"intermediate_size": 33}), tmp_path / "odd")
    write_quantized(odd, tmp_path / "d", CASES["fp8, one scale"])
    kept = load_kept(tmp_path / "d", torch.bfloat16)[1].keys()
    assert set(STACKS) & kept == {"layers.0.experts.gate_up.weight", "layers.1.experts.gate_up.weight"}

    plain = "layers.1.block_sparse_moe.experts.3.w3"
    config = CASES["awq"].config | {"modules_to_not_convert": [plain]}
    partly = replace(CASES["awq"], plain=(plain,), config=config)
    write_quantized(folder, tmp_path / "c", partly)
    weights, quantized = load_kept(tmp_path / "c", torch.bfloat16)
    assert set(STACKS) - quantized.keys() == {"layers.1.experts.gate_up.weight"}
    everything = load_dequantized(tmp_path / "c", torch.bfloat16)
    assert torch.equal(weights["layers.1.experts.gate_up.weight"], everything["layers.1.experts.gate_up.weight"])
    assert num_bytes(weights, quantized) == weight_bytes(load_spec(tmp_path / "c"), dtype_bytes=2, keeps_quantized=True)


def test_an_order_that_config_json_denies_is_refused(tmp_path: Path) -> None:
    folder = quantized_folder("mixtral", "gptq, 4 bits", tmp_path)
    edit_tensors(folder, lambda t: t.update({(n := f"model.layers.1.{G_IDX}"): t[n].flip(0)}))
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.experts\.down\.weight.*desc_act"):
        load_kept(folder, torch.bfloat16)


@pytest.mark.parametrize(
    ("model_type", "block", "gate_up", "down"),
    [
        # whole blocks in a gate's 128 rows, none that end with the 192 rows of a down
        ("qwen3_moe", (128, 128), (128, 128), (1, 128)),
        ("qwen3_moe", (64, 64), (64, 64), (64, 64)),
        # a gate's 96 rows end inside of a block, before its up begins
        ("mixtral", (64, 64), (1, 64), (64, 64)),
        ("mixtral", (128, 128), (1, 128), (1, 128)),
        ("mixtral", (None, None), (1, 192), (1, 96)),
    ],
)
def test_blocks_do_not_reach_over_two_matrices(
    model_type: str,
    block: tuple[int | None, int | None],
    gate_up: tuple[int, int],
    down: tuple[int, int],
    tmp_path: Path,
) -> None:
    folder = save_reference(make_reference(model_type, MODELS[model_type]), tmp_path / "reference")
    config = FP8_CONFIG if block == (None, None) else FP8_CONFIG | {"weight_block_size": list(block)}
    name = "weight_scale" if block == (None, None) else "weight_scale_inv"
    case = float8_case(config | {"modules_to_not_convert": ["lm_head"]}, name, block)
    write_quantized(folder, tmp_path / "quantized", case)
    everything = load_dequantized(tmp_path / "quantized", torch.bfloat16)
    _, quantized = load_kept(tmp_path / "quantized", torch.bfloat16)
    for stack, expected in zip(STACKS, (gate_up, down) * 2, strict=True):
        weight = quantized[stack]
        assert isinstance(weight, Float8Weight)
        assert weight.block == expected
        assert torch.equal(dequantized(weight, torch.bfloat16), everything[stack].flatten(0, 1))


@pytest.mark.parametrize(
    ("model_type", "case"),
    # blocks of 64 columns of Mixtral's 96 would be cut, and so would attention's in blocks of 128
    [pair for pair in product(MODELS, KEPT) if pair != ("mixtral", "fp8, small blocks") and "fp8, blocks" not in pair],
)
def test_ranks_have_slices_of_the_whole(model_type: str, case: str, tmp_path: Path) -> None:
    """Mixtral's 96 columns are three units: one and two. Blocks fall back to rows where the ranks' rows do not meet."""
    folder = quantized_folder(model_type, case, tmp_path)
    for rank in (Rank(index, 2) for index in range(2)):
        everything = load_dequantized(folder, torch.bfloat16, rank)
        weights, quantized = load_kept(folder, torch.bfloat16, rank)
        for name in STACKS:
            numbers = dequantized(quantized[name], torch.bfloat16)
            assert torch.equal(numbers, everything[name].flatten(0, 1)), name
        assert num_bytes(weights, quantized) == weight_bytes(
            load_spec(folder), dtype_bytes=2, keeps_quantized=True, rank=rank
        )


def test_only_dense_weights_are_dequantized_in_a_step(tmp_path: Path) -> None:
    """The largest is q, k and v with 384 rows; a stack has five times 192."""
    spec = load_spec(quantized_folder("mixtral", "awq", tmp_path))
    assert dequantized_bytes(spec, dtype_bytes=2) == 2 * 384 * 192


def test_one_part_after_the_other_is_unpacked() -> None:
    """While a part is made, at most the one before is still there, and what it left for the next tile."""
    num_parts, rows, columns = 6, 96, 128
    alive: list[weakref.ref[np.ndarray]] = []
    numbers = np.random.default_rng(0).integers(0, 16, (num_parts * rows, columns), dtype=np.uint8)

    def parts() -> Iterator[UnpackedWeight]:
        for index in range(num_parts):
            assert sum(ref() is not None for ref in alive) <= 2
            values = numbers[index * rows : (index + 1) * rows].copy()
            alive.append(weakref.ref(values))
            yield UnpackedWeight(torch.from_numpy(values), torch.full((rows, 1), 0.5), zeros=None, groups=None)

    parameter = Parameter("stack", (whole("m.weight", rows, columns),) * num_parts, num_experts=num_parts)
    scheme = WeightScheme(layout="packed", bits=4, block=(1, None))
    weight = packed(parts(), parameter, scheme, dtype=torch.bfloat16, rank=ONE_RANK)
    assert weight.num_outputs == num_parts * rows
    expected = (torch.from_numpy(numbers).float() - 8) / 2
    assert torch.equal(dequantized(weight, torch.float32), expected)


@pytest.mark.parametrize("case", ["awq", "int-quantized", "fp8, blocks", "fp8, one scale"])
def test_random_stacks_have_the_size_and_spread_of_read_ones(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made some rows at a time: 960 and 480 rows are no whole number of 256."""
    monkeypatch.setattr(dummy, "_ROWS_AT_ONCE", 256)
    folder = quantized_folder("mixtral", case, tmp_path)
    spec = load_spec(folder)
    kept = kept_parameters(parameters(spec), spec.quantization)
    random, again = (dummy_quantized(kept.values(), dtype=torch.bfloat16, device=CPU, rank=ONE_RANK) for _ in range(2))
    _, read = load_kept(folder, torch.bfloat16)
    assert random.keys() == read.keys()
    for name, weight in random.items():
        numbers = dequantized(weight, torch.float32)
        assert nbytes(weight) == nbytes(read[name])
        assert 0.95 < numbers.std() * weight.num_inputs**0.5 < 1.05
        assert torch.equal(numbers, dequantized(again[name], torch.float32))
        # no part is another one again
        assert not torch.equal(numbers[:64], numbers[256:320])


def test_layers_with_and_without_quantized_experts_are_unlike(tmp_path: Path) -> None:
    """A rehearsal of kernels goes through one of each, without memory."""
    folder = save_reference(
        make_reference("qwen3_moe", MODELS["qwen3_moe"] | {"num_hidden_layers": 5}), tmp_path / "reference"
    )
    matrices = product(range(4), ("gate", "up", "down"))
    plain = tuple(f"layers.3.mlp.experts.{expert}.{name}_proj" for expert, name in matrices)
    config = CASES["awq"].config | {"modules_to_not_convert": ["layers.3.mlp.experts"]}
    case = replace(CASES["awq"], plain=plain, config=config)
    write_quantized(folder, tmp_path / "quantized", case)
    model = load_without_memory(tmp_path / "quantized", dtype=torch.bfloat16, max_model_len=64)
    first, *others = model.with_unlike_layers()._layers
    downs = [layer.mlp.down for layer in (first, *others) if isinstance(layer.mlp, Moe)]
    assert [type(down) for down in downs] == [IntWeight, IntWeight, torch.Tensor]
    assert isinstance(downs[0], IntWeight)
    assert downs[0].tiles.device.type == "meta"
    assert (downs[0].num_outputs, downs[0].num_inputs) == (4 * 192, 128)
