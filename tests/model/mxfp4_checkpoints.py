"""gpt-oss folders whose experts are in MXFP4, as OpenAI publishes them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.model.reference_models import save_reference

WEIGHTS = "model.safetensors"
# of the scales, the last not among them: gates and ups so large that some are clamped
EXPONENTS = {"gate_up_proj": (-3, 0), "down_proj": (-7, -4)}


def save_with_mxfp4(model: PreTrainedModel, folder: Path) -> Path:
    """Give the model's experts numbers that MXFP4 has, and write it with those packed."""
    generator = torch.Generator().manual_seed(5)
    packed: dict[str, Tensor] = {}
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for name, exponents in EXPONENTS.items():
                weight = getattr(layer.mlp.experts, name)  # [num_experts, num_inputs, num_outputs]
                blocks, scales = random_mxfp4(weight.transpose(1, 2).shape, exponents, generator)
                there = f"model.layers.{index}.mlp.experts.{name}"
                packed |= {f"{there}_blocks": blocks, f"{there}_scales": scales}
                weight.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_reference(model, folder, quantization_config={"quant_method": "mxfp4"})
    tensors = load_file(folder / WEIGHTS)
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(tuple(EXPONENTS))}
    save_file(plain | packed, folder / WEIGHTS)
    return folder


def random_mxfp4(shape: torch.Size, exponents: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blocks and scales of a matrix stack [..., N, K]."""
    *rows, num_inputs = shape
    blocks = torch.randint(256, (*rows, num_inputs // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(127 + exponents[0], 127 + exponents[1], blocks.shape[:-1], generator=generator)
    return blocks, scales.to(torch.uint8)
