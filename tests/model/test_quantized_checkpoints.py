"""Checkpoints in every quantised layout compute what the same model computes with dequantised weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from llmd.errors import UnsupportedModel
from llmd.model.checkpoint import load_decoder
from llmd.model.decoder import Decoder
from llmd.model.dummy import dummy_quantized
from llmd.model.memory import weight_bytes
from llmd.model.parallel import Rank, whole
from llmd.model.parameters import parameters
from llmd.model.quantization import WeightScheme
from llmd.model.quantized_layouts import kept_parameters
from llmd.model.quantized_weights import dequantize, unpack
from llmd.model.spec import load_spec
from llmd_kernels import Float8Weight, dequantized
from tests.model.kept_weights import CPU, ONE_RANK, load_dequantized, load_kept, nbytes, num_bytes
from tests.model.paged_steps import logits_in_one_step
from tests.model.quantized_checkpoints import (
    CASES,
    WEIGHTS,
    awq,
    gptq,
    gptq_v2,
    int_quantized,
    pack_quantized,
    random_numbers,
    write_quantized,
)
from tests.model.reference_models import make_reference, reference_logits, save_reference
from tests.model.test_checkpoint import edit_tensors, joined

SEQUENCES = [[5, 17, 40, 3, 88, 61, 22, 9, 70, 31, 12], [90, 4, 55]]
# q has 192 rows, k and v 96 each: blocks of 128 rows do not meet
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
}
SHUFFLED = [case for case in CASES if "shuffled" in case]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_reference("llama", SIZES)


@pytest.fixture(scope="module")
def plain_folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reference(model, tmp_path_factory.mktemp("plain"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_decoder(folder, dtype=dtype, device=CPU)


def plain_copy(folder: Path, weights: dict[str, Tensor], target: Path) -> Path:
    """The folder's model with these weights instead."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(weights, target / WEIGHTS)
    return target


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_dequantized_weights(
    case: str, model: PreTrainedModel, plain_folder: Path, tmp_path: Path
) -> None:
    weights = write_quantized(plain_folder, tmp_path / "quantized", CASES[case])
    logits = logits_in_one_step(load(tmp_path / "quantized"), SEQUENCES)
    expected = logits_in_one_step(load(plain_copy(plain_folder, weights, tmp_path / "plain")), SEQUENCES)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))
    model.load_state_dict(weights)
    for ours, theirs in zip(logits, reference_logits(model, SEQUENCES), strict=True):
        assert theirs.std() > 0.1, "logits so small that they prove nothing"
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_weights_that_stay_quantized_mean_the_same(case: str, plain_folder: Path, tmp_path: Path) -> None:
    """In the kernels' layout, fused: the same numbers, the same logits, and the memory that was planned."""
    write_quantized(plain_folder, tmp_path, CASES[case])
    spec = load_spec(tmp_path)
    everything = load_dequantized(tmp_path, torch.bfloat16)
    weights, quantized = load_kept(tmp_path, torch.bfloat16)
    assert weights.keys() | quantized.keys() == everything.keys()
    assert not weights.keys() & quantized.keys()
    for name, weight in quantized.items():
        assert torch.equal(dequantized(weight, torch.bfloat16), everything[name]), name

    assert num_bytes(weights, quantized) == weight_bytes(spec, dtype_bytes=2, keeps_quantized=True)

    logits = logits_in_one_step(Decoder(spec, weights, quantized, max_model_len=64), SEQUENCES)
    expected = logits_in_one_step(load(tmp_path, torch.bfloat16), SEQUENCES)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))


def test_what_stays_quantized(plain_folder: Path, tmp_path: Path) -> None:
    """Not groups that no kernel knows; of a fused projection only where all its parts are alike."""
    write_quantized(plain_folder, tmp_path / "a", CASES["awq"])
    assert load_kept(tmp_path / "a", torch.bfloat16)[1].keys() == {
        f"layers.{index}.{name}.weight" for index in (0, 1) for name in ("qkv", "o", "gate_up", "down")
    }
    write_quantized(plain_folder, tmp_path / "b", CASES["awq, small groups, some layers plain"])
    assert not load_kept(tmp_path / "b", torch.bfloat16)[1]
    write_quantized(plain_folder, tmp_path / "c", CASES["gptq, 8 bits, rows, head"])
    assert "head" in load_kept(tmp_path / "c", torch.bfloat16)[1]


@pytest.mark.parametrize(
    ("case", "qkv", "o"),
    [
        ("fp8, blocks", (1, 128), (128, 128)),  # q's 192 rows are no whole blocks
        ("fp8, small blocks", (32, 64), (32, 64)),
        ("fp8, one scale", (1, 192), (1, 192)),
    ],
)
def test_blocks_of_fused_projections(
    case: str, qkv: tuple[int, int], o: tuple[int, int], plain_folder: Path, tmp_path: Path
) -> None:
    write_quantized(plain_folder, tmp_path, CASES[case])
    _, quantized = load_kept(tmp_path, torch.bfloat16)
    for name, block in (("qkv", qkv), ("o", o)):
        weight = quantized[f"layers.0.{name}.weight"]
        assert isinstance(weight, Float8Weight)
        assert weight.block == block


@pytest.mark.parametrize("case", [case for case in CASES if case != "fp8, blocks"])
def test_ranks_have_slices_of_the_whole(case: str, plain_folder: Path, tmp_path: Path) -> None:
    """3 KV heads and 10 or 5 groups on 2 ranks: they have different parts."""
    size = 2
    write_quantized(plain_folder, tmp_path, CASES[case])
    entire = load_dequantized(tmp_path, torch.float32)
    ranks = [load_dequantized(tmp_path, torch.float32, Rank(index, size)) for index in range(size)]
    for parameter in parameters(load_spec(tmp_path)):
        assert torch.equal(joined([rank[parameter.name] for rank in ranks], parameter), entire[parameter.name])
    if case in SHUFFLED:
        return
    for index in range(size):
        weights, quantized = load_kept(tmp_path, torch.float32, Rank(index, size))
        for name, weight in quantized.items():
            assert torch.equal(dequantized(weight, torch.float32), ranks[index][name]), name
        assert num_bytes(weights, quantized) == weight_bytes(
            load_spec(tmp_path), dtype_bytes=4, keeps_quantized=True, rank=Rank(index, size)
        )


@pytest.mark.parametrize("case", ["fp8, blocks", *SHUFFLED])
def test_ranks_that_would_have_parts_of_groups_are_refused(case: str, plain_folder: Path, tmp_path: Path) -> None:
    """o's 192 inputs are 3 KV heads of 64, blocks are 128; and shuffled groups are everywhere."""
    write_quantized(plain_folder, tmp_path, CASES[case])
    with pytest.raises(UnsupportedModel, match=r"o(_proj|\.weight).* split over"):
        load_kept(tmp_path, torch.bfloat16, Rank(0, 3))


@pytest.mark.parametrize(("model_type", "fields"), [("phi3", {}), ("qwen2", {"tie_word_embeddings": True})])
def test_other_families(model_type: str, fields: dict[str, object], tmp_path: Path) -> None:
    """Projections that the checkpoint keeps fused, biases, a tied head."""
    model = make_reference(model_type, SIZES | fields)
    folder = save_reference(model, tmp_path / "plain")
    for case in ("gptq, 4 bits, asymmetric", "awq", "fp8, small blocks"):
        weights = write_quantized(folder, tmp_path / case, CASES[case])
        model.load_state_dict(weights, strict=False)
        for ours, theirs in zip(
            logits_in_one_step(load(tmp_path / case), SEQUENCES), reference_logits(model, SEQUENCES), strict=True
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("case", "edit", "named"),
    [
        ("awq", lambda t: t.pop(f"{Q_PROJ}.qzeros"), rf"{Q_PROJ}\.qzeros; quantization_config.*awq, 4 bits, groups of"),
        ("gptq, 4 bits, shuffled", lambda t: t.pop(f"{Q_PROJ}.g_idx"), rf"{Q_PROJ}\.g_idx"),
        ("awq", lambda t: t.update({f"{Q_PROJ}.qweight": torch.ones(24, 192).int()}), r"qweight.*\[192, 24\]"),
        ("awq", lambda t: t.update({f"{Q_PROJ}.scales": torch.ones(6, 192, dtype=torch.int32)}), "scales.*dtype I32"),
        ("awq", lambda t: t.update({f"{Q_PROJ}.weight": torch.ones(192, 192)}), rf"{Q_PROJ}\.weight that"),
        ("awq", lambda t: t.update({f"{Q_PROJ}.bias": torch.ones(192)}), rf"{Q_PROJ}\.bias that"),
        (
            "gptq, 4 bits, shuffled",
            lambda t: t.update({f"{Q_PROJ}.g_idx": torch.zeros(192, dtype=torch.int32)}),
            "groups of inputs that are not all of 32",
        ),
        ("fp8, blocks", lambda t: t.update({f"{Q_PROJ}.weight_scale_inv": torch.ones(2, 1)}), r"\[2, 1\].*\[2, 2\]"),
        ("fp8, blocks", lambda t: t.update({f"{Q_PROJ}.weight": torch.ones(192, 192)}), "dtype F32.*: F8_E4M3"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_refused_by_name(
    case: str, edit: Callable[[dict[str, Tensor]], object], named: str, plain_folder: Path, tmp_path: Path
) -> None:
    write_quantized(plain_folder, tmp_path, CASES[case])
    edit_tensors(tmp_path, edit)
    with pytest.raises(UnsupportedModel, match=named):
        load(tmp_path)


def test_parts_with_other_orders_stay_apart(plain_folder: Path, tmp_path: Path) -> None:
    """Fused they would need one order; dequantised one by one they do not."""
    write_quantized(plain_folder, tmp_path, CASES["gptq, 4 bits, shuffled"])
    edit_tensors(tmp_path, lambda t: t.update({f"{Q_PROJ}.g_idx": t[f"{Q_PROJ}.g_idx"].flip(0)}))
    load(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.qkv\.weight.*desc_act"):
        load_kept(tmp_path, torch.bfloat16)


def test_figures_of_activations_and_caches_may_lie_beside(plain_folder: Path, tmp_path: Path) -> None:
    write_quantized(plain_folder, tmp_path, CASES["fp8, one scale"])
    expected = logits_in_one_step(load(tmp_path), SEQUENCES)
    beside = {f"{Q_PROJ}.input_scale": torch.tensor(0.5), "model.layers.0.self_attn.k_scale": torch.tensor(0.1)}
    edit_tensors(tmp_path, lambda t: t.update(beside))
    assert torch.equal(logits_in_one_step(load(tmp_path), SEQUENCES)[0], expected[0])


def test_progress_counts_what_is_held(plain_folder: Path, tmp_path: Path) -> None:
    write_quantized(plain_folder, tmp_path, CASES["awq"])
    heard: list[tuple[int, int]] = []
    load_decoder(tmp_path, dtype=torch.float32, device=CPU, progress=lambda done, total: heard.append((done, total)))
    everything = weight_bytes(load_spec(tmp_path), dtype_bytes=4)
    assert (heard[0], heard[-1]) == ((0, everything), (everything, everything))


@pytest.mark.parametrize("case", ["gptq, 4 bits, shuffled", "int-quantized", "fp8, blocks"])
def test_random_weights_have_the_size_and_spread_of_read_ones(case: str, plain_folder: Path, tmp_path: Path) -> None:
    write_quantized(plain_folder, tmp_path, CASES[case])
    spec = load_spec(tmp_path)
    kept = kept_parameters(parameters(spec), spec.quantization)
    random = dummy_quantized(kept.values(), dtype=torch.bfloat16, device=CPU, rank=ONE_RANK)
    _, read = load_kept(tmp_path, torch.bfloat16)
    assert random.keys() == read.keys()
    for name, weight in random.items():
        assert nbytes(weight) == nbytes(read[name])
        assert 0.9 < dequantized(weight, torch.float32).std() * weight.num_inputs**0.5 < 1.1


LAYOUTS = {
    "awq": (awq, False),
    "gptq": (gptq, False),
    "gptq_v2": (gptq_v2, False),
    "packed": (lambda numbers: pack_quantized(numbers, symmetric=False), False),
    "int8": (lambda numbers: int_quantized(numbers, symmetric=False), False),
}


@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    bits=st.sampled_from([4, 8]),
    num_outputs=st.integers(1, 6).map(lambda n: 8 * n),
    num_groups=st.integers(1, 4),
    group_size=st.sampled_from([8, 16, 64]),
    shuffled=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_unpacking_inverts_packing(
    layout: str, bits: int, num_outputs: int, num_groups: int, group_size: int, shuffled: bool,
    seed: int,
) -> None:  # fmt: skip
    bits = {"awq": 4, "int8": 8}.get(layout, bits)
    shuffled = shuffled and layout not in ("awq", "int8")
    random = np.random.default_rng(seed)
    numbers = random_numbers(
        (num_outputs, num_groups * group_size), bits=bits, group_size=group_size, symmetric=False, random=random,
        shuffle=random if shuffled else None,
    )  # fmt: skip
    tensors = {f"m.{name}": tensor for name, tensor in LAYOUTS[layout][0](numbers).items()}
    scheme = WeightScheme(layout=layout, bits=bits, block=(1, group_size), symmetric=False, shuffled=shuffled)
    piece = whole("m.weight", *numbers.q.shape)
    unpacked = unpack(piece, scheme, tensors=tensors, rank=Rank(), device=CPU)
    assert torch.equal(unpacked.values, torch.from_numpy(numbers.q.astype(np.uint8)))
    assert torch.equal(unpacked.zeros, torch.from_numpy(numbers.zeros.astype(np.uint8)))
    assert torch.equal(unpacked.scales, numbers.scales)
    assert torch.equal(dequantize(unpacked, scheme, torch.float32), numbers.dequantized())
