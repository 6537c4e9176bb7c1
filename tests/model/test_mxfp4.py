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
from llmd.model.checkpoint import load_decoder, load_parameters
from llmd.model.mxfp4 import copy_mxfp4
from llmd.model.parallel import Rank
from llmd.model.parameters import parameters
from llmd.model.safetensors_folder import read_headers
from llmd.model.spec import load_spec
from tests.model.paged_steps import logits_in_chunks
from tests.model.reference_models import CASES, VOCAB_SIZE, make_reference, reference_logits, save_reference

CPU = torch.device("cpu")
MODEL_TYPE, FIELDS = CASES["gpt-oss"]
SIZES = {"hidden_size": 64, "intermediate_size": 96}
WEIGHTS = "model.safetensors"


def random_mxfp4(*shape: int, exponents: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blocks and scales of a matrix stack [..., N, K]; exponents of the scales, the last not among them."""
    *rows, num_inputs = shape
    blocks = torch.randint(256, (*rows, num_inputs // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(127 + exponents[0], 127 + exponents[1], blocks.shape[:-1], generator=generator)
    return blocks, scales.to(torch.uint8)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """A model with MXFP4's numbers in its experts, and the folder that has them packed."""
    model = make_reference(MODEL_TYPE, FIELDS | SIZES)
    generator = torch.Generator().manual_seed(5)
    packed: dict[str, Tensor] = {}
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            # gates and ups so large that some are clamped
            for name, shape, exponents in (
                ("gate_up_proj", (5, 192, 64), (-3, 0)),
                ("down_proj", (5, 64, 96), (-7, -4)),
            ):
                blocks, scales = random_mxfp4(*shape, exponents=exponents, generator=generator)
                there = f"model.layers.{index}.mlp.experts.{name}"
                packed |= {f"{there}_blocks": blocks, f"{there}_scales": scales}
                matrices = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
                getattr(layer.mlp.experts, name).copy_(matrices)
    folder = save_reference(model, tmp_path, quantization_config={"quant_method": "mxfp4"})
    tensors = {
        name: t for name, t in load_file(folder / WEIGHTS).items() if not name.endswith(("up_proj", "down_proj"))
    }
    save_file(tensors | packed, folder / WEIGHTS)
    return model, folder


def weights_of(folder: Path, rank: Rank) -> dict[str, Tensor]:
    return load_parameters(
        read_headers(folder), parameters(load_spec(folder)), dtype=torch.float32, device=CPU, rank=rank,
        progress=lambda _done, _total: None,
    )  # fmt: skip


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
    whole = weights_of(folder, Rank())
    ranks = [weights_of(folder, Rank(index, 2)) for index in range(2)]
    assert [rank["layers.0.experts.down.weight"].shape[2] for rank in ranks] == [32, 64]
    down = torch.cat([rank["layers.0.experts.down.weight"] for rank in ranks], dim=2)
    gates, ups = zip(*(rank["layers.0.experts.gate_up.weight"].chunk(2, dim=1) for rank in ranks), strict=True)
    assert torch.equal(down, whole["layers.0.experts.down.weight"])
    assert torch.equal(torch.cat((*gates, *ups), dim=1), whole["layers.0.experts.gate_up.weight"])


def test_every_code_and_scale() -> None:
    """All bytes under scales from the least to the greatest, and the scale that is not a number."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(4, 1, 1)
    scales = torch.tensor([1, 127, 252, 255], dtype=torch.uint8)[:, None].repeat(1, 16)
    target = torch.empty(4, 512)
    copy_mxfp4(target, blocks, scales)
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].T
    assert torch.equal(target[:3], expected[:3])
    assert target[3].isnan().all()
    rounded = torch.empty(4, 512, dtype=torch.bfloat16)
    copy_mxfp4(rounded, blocks, scales)
    assert torch.equal(rounded[:3].float(), expected[:3]), "not exact in bfloat16"


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
