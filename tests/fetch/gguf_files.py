"""Small GGUF files for tests, written by the `gguf` package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from numpy.typing import NDArray

F32 = GGMLQuantizationType.F32

# enough of a tokenizer for a file to be converted: every byte, one merge, an end token
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|im_end|>"],
    "tokenizer.ggml.token_type": [TokenType.NORMAL, TokenType.NORMAL, TokenType.NORMAL, TokenType.CONTROL],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}

LLAMA: dict[str, Any] = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 4,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 32,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
LLAMA_SHAPES = {
    "attn_q": (256, 256),
    "attn_k": (128, 256),
    "attn_v": (128, 256),
    "attn_output": (256, 256),
    "ffn_gate": (512, 256),
    "ffn_up": (512, 256),
    "ffn_down": (256, 512),
}


def write_gguf(
    path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[NDArray[Any], Any]]
) -> None:
    """`tensors`: name → (data as the type stores it, GGML type)."""
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_llama(
    path: Path,
    kind: GGMLQuantizationType = F32,
    metadata: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, tuple[NDArray[Any], Any]] | None = None,
) -> None:
    """A tiny random llama with all matrices of one type, norms in F32 as GGUF files have them."""
    generator = np.random.default_rng(7)
    tensors = {"token_embd.weight": (stored(generator, (4, 256), kind), kind)}
    for layer in range(2):
        for name, shape in LLAMA_SHAPES.items():
            tensors[f"blk.{layer}.{name}.weight"] = (stored(generator, shape, kind), kind)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = (stored(generator, (256,), F32), F32)
    tensors["output_norm.weight"] = (stored(generator, (256,), F32), F32)
    write_gguf(path, "llama", {**LLAMA, **TOKENIZER, **(metadata or {})}, {**tensors, **(extra_tensors or {})})


def stored(generator: np.random.Generator, shape: tuple[int, ...], kind: GGMLQuantizationType) -> NDArray[Any]:
    """Random weights as `kind` stores them."""
    try:
        return np.asarray(quantize(generator.standard_normal(shape, dtype=np.float32), kind))
    except NotImplementedError:
        return _random_blocks(generator, shape, kind)


def _random_blocks(generator: np.random.Generator, shape: tuple[int, ...], kind: GGMLQuantizationType) -> NDArray[Any]:
    """Any bits are valid blocks of a K-quantisation, but its float16 scales, at these offsets, should be finite."""
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
    block_size, type_size = GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // block_size, type_size), dtype=np.uint8)
    for offset in scales:
        values = generator.standard_normal((*blocks.shape[:-1], 1)).astype(np.float16)
        blocks[..., offset : offset + 2] = values.view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
