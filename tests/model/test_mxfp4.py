"""gpt-oss checkpoints in MXFP4 are the model that transformers dequantises them to."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmd.errors import UnsupportedModel
from llmd.model import checkpoint
from llmd.model.checkpoint import load_decoder
from llmd.model.dummy import dummy_quantized
from llmd.model.memory import weight_bytes
from llmd.model.moe import Moe
from llmd.model.parallel import Rank
from llmd.model.parameters import parameters
from llmd.model.quantized_layouts import kept_parameters
from llmd.model.spec import load_spec
from llmd_kernels import Float4Weight, dequantized, float4_numbers, pack_float4_weight
from tests.model.kept_weights import CPU, load_dequantized, load_kept, nbytes, num_bytes
from tests.model.mxfp4_checkpoints import WEIGHTS, save_with_mxfp4
from tests.model.paged_steps import hidden_in_one_step, logits_in_chunks
from tests.model.reference_models import CASES, VOCAB_SIZE, make_reference, reference_logits

MODEL_TYPE, FIELDS = CASES["gpt-oss"]
SIZES = {"hidden_size": 64, "intermediate_size": 96}
SEQUENCES = [[5, 17, 40, 3, 88, 61, 22, 9, 70, 31, 12], [90, 4, 55]]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """A model with MXFP4's numbers in its experts, and the folder that has them packed."""
    model = make_reference(MODEL_TYPE, FIELDS | SIZES)
    return model, save_with_mxfp4(model, tmp_path)


def test_logits_are_those_of_the_dequantised_model(pair: tuple[PreTrainedModel, Path]) -> None:
    model, folder = pair
    decoder = load_decoder(folder, dtype=torch.float32, device=CPU, max_model_len=40)
    generator = torch.Generator().manual_seed(7)
    sequences = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (40, 11)]
    for ours, theirs in zip(
        logits_in_chunks(decoder, sequences, [9, 1, 30]), reference_logits(model, sequences), strict=True
    ):
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_ranks_read_whole_blocks(pair: tuple[PreTrainedModel, Path]) -> None:
    """96 columns are three units of 32, MXFP4's block: one and two."""
    _, folder = pair
    whole = load_dequantized(folder, torch.float32)
    ranks = [load_dequantized(folder, torch.float32, Rank(index, 2)) for index in range(2)]
    assert [rank["layers.0.experts.down.weight"].shape[2] for rank in ranks] == [32, 64]
    down = torch.cat([rank["layers.0.experts.down.weight"] for rank in ranks], dim=2)
    gates, ups = zip(*(rank["layers.0.experts.gate_up.weight"].chunk(2, dim=1) for rank in ranks), strict=True)
    assert torch.equal(down, whole["layers.0.experts.down.weight"])
    assert torch.equal(torch.cat((*gates, *ups), dim=1), whole["layers.0.experts.gate_up.weight"])


def test_every_code_and_scale() -> None:
    """All bytes under scales from the least to the greatest, and the scale that is not a number."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(5, 1, 1)
    scales = torch.tensor([0, 1, 127, 252, 255], dtype=torch.uint8)[:, None].repeat(1, 16)
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(1)
    numbers = float4_numbers(codes, scales, torch.float32)
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].T
    assert torch.equal(numbers[:4], expected[:4])
    assert numbers[4].isnan().all()
    rounded = float4_numbers(codes, scales, torch.bfloat16)
    assert torch.equal(rounded[:4].float(), expected[:4]), "not exact in bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_changes_no_number(dtype: torch.dtype) -> None:
    """Under any scale, also one that float16 does not hold."""
    exponents = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).repeat(256, 1)
    kept = dequantized(pack_float4_weight(codes, exponents), dtype)
    torch.testing.assert_close(float4_numbers(codes, exponents, dtype), kept, atol=0, rtol=0, equal_nan=True)


EXPERTS = [f"layers.{index}.experts.{name}.weight" for index in range(4) for name in ("gate_up", "down")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_stay_as_they_are_where_there_are_kernels(
    dtype: torch.dtype, pair: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five experts of 96 and 64 rows: most of their rows are in tiles with another's."""
    _, folder = pair
    everything = load_dequantized(folder, dtype)
    weights, quantized = load_kept(folder, dtype)
    assert sorted(quantized) == sorted(EXPERTS)
    for name, weight in quantized.items():
        assert isinstance(weight, Float4Weight)
        assert torch.equal(dequantized(weight, dtype), everything[name].flatten(0, 1)), name
    assert num_bytes(weights, quantized) == weight_bytes(load_spec(folder), dtype_bytes=2, keeps_quantized=True)

    expected = load_decoder(folder, dtype=dtype, device=CPU, max_model_len=40)
    monkeypatch.setattr(checkpoint, "has_quantized_kernels", lambda **_: True)
    decoder = load_decoder(folder, dtype=dtype, device=CPU, max_model_len=40)
    assert isinstance(decoder._layers[0].mlp, Moe)
    assert isinstance(decoder._layers[0].mlp.down, Float4Weight)
    assert torch.equal(hidden_in_one_step(decoder, SEQUENCES), hidden_in_one_step(expected, SEQUENCES))


def test_ranks_keep_whole_blocks(pair: tuple[PreTrainedModel, Path]) -> None:
    _, folder = pair
    for rank in (Rank(index, 2) for index in range(2)):
        everything = load_dequantized(folder, torch.bfloat16, rank)
        weights, quantized = load_kept(folder, torch.bfloat16, rank)
        assert num_bytes(weights, quantized) == weight_bytes(
            load_spec(folder), dtype_bytes=2, keeps_quantized=True, rank=rank
        )
        for name in EXPERTS:
            numbers = dequantized(quantized[name], torch.bfloat16)
            assert torch.equal(numbers, everything[name].flatten(0, 1)), name


def test_random_weights_have_the_size_and_spread_of_others(pair: tuple[PreTrainedModel, Path]) -> None:
    _, folder = pair
    spec = load_spec(folder)
    kept = kept_parameters(parameters(spec), spec.quantization)
    random = dummy_quantized(kept.values(), dtype=torch.bfloat16, device=CPU, rank=Rank())
    _, read = load_kept(folder, torch.bfloat16)
    assert random.keys() == read.keys()
    for name, weight in random.items():
        assert nbytes(weight) == nbytes(read[name])
        assert 0.95 < dequantized(weight, torch.float32).std() * weight.num_inputs**0.5 < 1.05


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.down_proj_scales"), "layers.1.mlp.experts.down_proj_scales"),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.down_proj_blocks": torch.ones(5, 64, 3, 16)}),
            "down_proj_blocks has the dtype F32; supported: U8",
        ),
        (
            lambda t: t.update(
                {"model.layers.1.mlp.experts.down_proj_scales": torch.ones(5, 64, 2, dtype=torch.uint8)}
            ),
            r"down_proj_scales .*\[5, 64, 2\].*\[5, 64, 3\]",
        ),
    ],
    ids=["missing", "not packed", "misshapen"],
)
def test_wrong_tensors_are_refused_by_name(
    edit: Callable[[dict[str, Tensor]], object], named: str, pair: tuple[PreTrainedModel, Path]
) -> None:
    _, folder = pair
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UnsupportedModel, match=named):
        load_decoder(folder, dtype=torch.float32, device=CPU, max_model_len=40)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"intermediate_size": 80}, "intermediate_size"),
        ({"hidden_size": 72}, "hidden_size"),
    ],
)
def test_what_is_no_mxfp4_model_is_refused(
    changes: dict[str, object], named: str, pair: tuple[PreTrainedModel, Path]
) -> None:
    _, folder = pair
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UnsupportedModel, match=named):
        load_spec(folder)
