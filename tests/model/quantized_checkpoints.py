"""Tiny checkpoints in every quantised layout, written number by number as the layouts' own tools define them.

Written for clearness, without the loader's ideas: numpy integers, a loop over places in a word.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Array = np.ndarray[Any, Any]
Tensors = dict[str, Tensor]

WEIGHTS = "model.safetensors"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Numbers:
    """A quantised matrix: what it is, before it is laid out."""

    q: Array  # [N, K]
    zeros: Array  # [N, G]
    scales: Tensor  # [N, G]
    groups: Array  # [K]
    bits: int

    def dequantized(self) -> Tensor:
        """float32 [N, K]."""
        integers = torch.from_numpy((self.q - self.zeros[:, self.groups]).astype(np.float32))
        return integers * self.scales.float()[:, torch.from_numpy(self.groups)]


def random_numbers(
    shape: tuple[int, int],
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    random: np.random.Generator,
    shuffle: np.random.Generator | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> Numbers:
    """Any integers, scales such that products stay of one size. shuffle: makes the order of the inputs."""
    num_outputs, num_inputs = shape
    group_size = group_size or num_inputs
    num_groups = num_inputs // group_size
    q = random.integers(0, 2**bits, shape)
    zeros = random.integers(0, 2**bits, (num_outputs, num_groups))
    if symmetric:
        zeros = np.full_like(zeros, 2 ** (bits - 1))
    scales = random.uniform(0.5, 1.5, (num_outputs, num_groups)) * 4 / 2**bits / num_inputs**0.5
    groups = np.arange(num_inputs) // group_size
    if shuffle is not None:
        groups = shuffle.permutation(groups)
    return Numbers(q, zeros, torch.from_numpy(scales).to(scale_dtype), groups, bits)


def packed(values: Array, bits: int, *, order: tuple[int, ...] | None = None) -> Array:
    """[rows, columns] → int32 words along the rows' length: the first of a word in its lowest bits, or in `order`."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    words = np.zeros((values.shape[0], -(-values.shape[1] // per_word)), dtype=np.uint64)
    for column in range(words.shape[1]):
        for place in range(per_word):
            source = column * per_word + order[place]
            if source < values.shape[1]:
                words[:, column] |= values[:, source].astype(np.uint64) << np.uint64(place * bits)
    return words.astype(np.uint32).view(np.int32)


def awq(numbers: Numbers) -> Tensors:
    """AutoAWQ, gemm: everything transposed, eight outputs a word."""
    return {
        "qweight": tensor(packed(numbers.q.T, 4, order=AWQ_ORDER)),
        "qzeros": tensor(packed(numbers.zeros.T, 4, order=AWQ_ORDER)),
        "scales": numbers.scales.T.contiguous(),
    }


def gptq(numbers: Numbers) -> Tensors:
    """GPTQModel: made as gptq_v2, then one is taken from each zero point, word by word."""
    tensors = gptq_v2(numbers)
    ones = sum(1 << shift for shift in range(0, 32, numbers.bits))
    return tensors | {"qzeros": tensors["qzeros"] - ones}


def gptq_v2(numbers: Numbers) -> Tensors:
    return {
        "qweight": tensor(packed(numbers.q, numbers.bits).T),
        "qzeros": tensor(packed(numbers.zeros.T, numbers.bits)),
        "scales": numbers.scales.T.contiguous(),
        "g_idx": tensor(numbers.groups.astype(np.int32)),
    }


def pack_quantized(numbers: Numbers, *, symmetric: bool) -> Tensors:
    """compressed-tensors: inputs in words, zero points packed over outputs."""
    tensors = {
        "weight_packed": tensor(packed(numbers.q, numbers.bits)),
        "weight_scale": numbers.scales,
        "weight_shape": torch.tensor(numbers.q.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = tensor(packed(numbers.zeros.T, numbers.bits).T)
    if not np.array_equal(numbers.groups, np.sort(numbers.groups)):
        tensors["weight_g_idx"] = tensor(numbers.groups.astype(np.int32))
    return tensors


def int_quantized(numbers: Numbers, *, symmetric: bool) -> Tensors:
    """compressed-tensors: signed bytes."""
    tensors = {"weight": tensor((numbers.q - 128).astype(np.int8)), "weight_scale": numbers.scales}
    if not symmetric:
        tensors["weight_zero_point"] = tensor((numbers.zeros - 128).astype(np.int8))
    return tensors


def float8(
    shape: tuple[int, int], block: tuple[int, int], random: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, float32 scales and the dequantised matrix."""
    # what lies beyond the largest number is made NaN by some versions of PyTorch, and the largest by others
    values = torch.from_numpy(random.normal(0, 100, shape).clip(-448, 448)).to(torch.float8_e4m3fn)
    num_scales = [-(-size // step) for size, step in zip(shape, block, strict=True)]
    scales = torch.from_numpy(random.uniform(0.5, 1.5, num_scales) / 100 / shape[1] ** 0.5).float()
    everywhere = scales[np.arange(shape[0]) // block[0]][:, np.arange(shape[1]) // block[1]]
    return values, scales, values.float() * everywhere


def tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


@dataclass
class Case:
    """A way to write a linear layer. quantize: [N, K], its module's name → its tensors, its float32 weight."""

    config: dict[str, Any]
    quantize: Callable[[tuple[int, int], str, np.random.Generator], tuple[Tensors, Tensor]]
    head: bool = False
    plain: tuple[str, ...] = field(default=())  # ends of modules' names that stay as they are


def write_quantized(plain_folder: Path, folder: Path, case: Case) -> Tensors:
    """A quantised copy of a model folder → the tensors of the same model, dequantised."""
    random = np.random.default_rng(3)
    stored, dequantized = {}, {}
    for name, weight in load_file(plain_folder / WEIGHTS).items():
        module = name.removesuffix(".weight")
        is_router = module.endswith((".gate", ".shared_expert_gate"))
        is_linear = weight.dim() == 2 and not is_router and "embed" not in name and (case.head or "lm_head" not in name)
        if not is_linear or module.endswith(case.plain or ("nothing",)):
            stored[name] = dequantized[name] = weight
            continue
        tensors, dequantized[name] = case.quantize((weight.shape[0], weight.shape[1]), module, random)
        stored |= {f"{module}.{part}": t.contiguous() for part, t in tensors.items()}
    folder.mkdir(exist_ok=True)
    config = json.loads((plain_folder / "config.json").read_text()) | {"quantization_config": case.config}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / WEIGHTS)
    return dequantized


def integer_case(
    layout: Callable[..., Tensors],
    config: dict[str, Any],
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    shuffled: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    extra: Callable[[tuple[int, int]], Tensors] = lambda _shape: {},
    **changes: Any,
) -> Case:
    def quantize(shape: tuple[int, int], module: str, random: np.random.Generator) -> tuple[Tensors, Tensor]:
        numbers = random_numbers(
            shape,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            random=random,
            # layers that read the same input have the same order
            shuffle=np.random.default_rng(len(module.rpartition(".")[0])) if shuffled else None,
            scale_dtype=scale_dtype,
        )
        return layout(numbers) | extra(shape), numbers.dequantized()

    return Case(config, quantize, **changes)


def float8_case(config: dict[str, Any], scales: str, block: tuple[int | None, int | None], **changes: Any) -> Case:
    """scales: the name of their tensor; their shape is [] for one, [N, 1] for rows."""

    def quantize(shape: tuple[int, int], _module: str, random: np.random.Generator) -> tuple[Tensors, Tensor]:
        values, factors, weight = float8(shape, (block[0] or shape[0], block[1] or shape[1]), random)
        if block == (None, None):
            factors = factors.reshape(())
        return {"weight": values, scales: factors}, weight

    return Case(config, quantize, **changes)


def compressed(form: str, *, ignore: tuple[str, ...] = ("lm_head",), **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": list(ignore), "kv_cache_scheme": None,
    }  # fmt: skip


def compressed_int(form: str, *, bits: int, group_size: int | None, symmetric: bool, **changes: Any) -> Case:
    strategy = "channel" if group_size is None else "group"
    layout = pack_quantized if form == "pack-quantized" else int_quantized
    shuffled = changes.pop("shuffled", False)
    config = compressed(
        form, num_bits=bits, type="int", strategy=strategy, group_size=group_size, symmetric=symmetric,
        actorder="group" if shuffled else None, **changes.pop("weights", {}),
    )  # fmt: skip
    return integer_case(
        lambda numbers: layout(numbers, symmetric=symmetric), config, bits=bits, group_size=group_size,
        symmetric=symmetric, shuffled=shuffled, scale_dtype=torch.bfloat16, **changes,
    )  # fmt: skip


def gptq_case(
    *, bits: int, group_size: int | None, sym: bool, v2: bool = False, desc_act: bool = False, **changes: Any
) -> Case:
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size or -1, "sym": sym, "desc_act": desc_act,
        "checkpoint_format": "gptq_v2" if v2 else "gptq", **changes.pop("config", {}),
    }  # fmt: skip
    layout = changes.pop("layout", gptq_v2 if v2 else gptq)
    return integer_case(layout, config, bits=bits, group_size=group_size, symmetric=sym, shuffled=desc_act, **changes)


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}


def zero_bias(shape: tuple[int, int]) -> Tensors:
    return {"bias": torch.zeros(shape[0], dtype=torch.float16)}


CASES: dict[str, Case] = {
    "awq": integer_case(awq, AWQ_CONFIG, bits=4, group_size=32, symmetric=False),
    "awq, small groups, some layers plain": integer_case(
        awq, AWQ_CONFIG | {"group_size": 16, "modules_to_not_convert": ["self_attn.k_proj", "model.layers.1"]},
        bits=4, group_size=16, symmetric=False,
        plain=("self_attn.k_proj", *(f"model.layers.1.{m}" for m in (
            "self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
        ))),
    ),
    "gptq, 4 bits": gptq_case(bits=4, group_size=32, sym=True, extra=zero_bias),
    "gptq, 4 bits, asymmetric": gptq_case(bits=4, group_size=64, sym=False),
    "gptq, 4 bits, v2 in all but name": gptq_case(bits=4, group_size=32, sym=True, layout=gptq_v2),
    "gptq_v2, 4 bits, asymmetric": gptq_case(bits=4, group_size=32, sym=False, v2=True),
    "gptq, 4 bits, shuffled": gptq_case(bits=4, group_size=32, sym=False, desc_act=True),
    "gptq, 8 bits, rows, head": gptq_case(
        bits=8, group_size=None, sym=True, desc_act=True, config={"lm_head": True}, head=True
    ),
    "gptq, 8 bits, asymmetric": gptq_case(bits=8, group_size=32, sym=False),
    "pack-quantized, 4 bits": compressed_int("pack-quantized", bits=4, group_size=32, symmetric=True),
    "pack-quantized, 4 bits, asymmetric": compressed_int("pack-quantized", bits=4, group_size=32, symmetric=False),
    "pack-quantized, 4 bits, shuffled": compressed_int(
        "pack-quantized", bits=4, group_size=32, symmetric=False, shuffled=True
    ),
    "pack-quantized, 8 bits": compressed_int("pack-quantized", bits=8, group_size=None, symmetric=True),
    "int-quantized": compressed_int("int-quantized", bits=8, group_size=None, symmetric=True),
    "int-quantized, asymmetric": compressed_int("int-quantized", bits=8, group_size=None, symmetric=False),
    "naive-quantized integers": compressed_int("naive-quantized", bits=8, group_size=None, symmetric=True),
    "float-quantized, one scale": float8_case(
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor"), "weight_scale", (None, None)
    ),
    "float-quantized, rows": float8_case(
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"), "weight_scale", (1, None)
    ),
    "naive-quantized floats": float8_case(
        compressed("naive-quantized", num_bits=8, type="float", strategy="channel"), "weight_scale", (1, None)
    ),
    "fp8, blocks": float8_case(
        FP8_CONFIG | {"weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
        "weight_scale_inv", (128, 128),
    ),
    "fp8, small blocks": float8_case(
        FP8_CONFIG | {"weight_block_size": [32, 64]}, "weight_scale_inv", (32, 64)
    ),
    "fp8, one scale": float8_case(
        FP8_CONFIG | {"activation_scheme": "static", "ignored_layers": ["lm_head"]}, "weight_scale", (None, None)
    ),
    "fbgemm_fp8": float8_case(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        "weight_scale", (1, None),
    ),
}  # fmt: skip
