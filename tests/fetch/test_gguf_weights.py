"""Every quantisation type, against the `gguf` package's own reader and dequantisation, bit for bit."""

import json
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open

from llmd.errors import StartupFailed, UnsupportedModel
from llmd.fetch.gguf.convert import convert
from llmd.fetch.gguf.weights import to_bfloat16
from llmd.fetch.progress import ignore_progress
from tests.fetch.gguf_files import TOKENIZER, write_gguf, write_llama

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@pytest.mark.parametrize("type_name", TYPES)
def test_every_tensor_is_what_gguf_dequantises(tmp_path: Path, type_name: str) -> None:
    kind = GGMLQuantizationType[type_name]
    write_llama(tmp_path / "m.gguf", kind)
    folder = convert(tmp_path / "m.gguf", tmp_path / "out", ignore_progress)
    tensors = GGUFReader(tmp_path / "m.gguf").tensors
    stored = _raw_tensors(folder / "model.safetensors")
    assert len(stored) == len(tensors)
    for tensor in tensors:
        expected = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            expected = _halves_apart(expected, head_dim=32)
        dtype, bits = stored[_transformers_name(tensor.name)]
        assert dtype == {"F32": "F32", "F16": "F16"}.get(tensor.tensor_type.name, "BF16")
        assert np.array_equal(bits, _bits(expected, dtype)), tensor.name


@pytest.mark.parametrize(("type_name", "dtype"), [("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16")])
def test_config_names_the_type_of_the_weights(tmp_path: Path, type_name: str, dtype: str) -> None:
    write_llama(tmp_path / "m.gguf", GGMLQuantizationType[type_name])
    folder = convert(tmp_path / "m.gguf", tmp_path / "out", ignore_progress)
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == dtype
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True


def test_the_file_is_valid_safetensors(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", GGMLQuantizationType.Q4_0)
    folder = convert(tmp_path / "m.gguf", tmp_path / "out", ignore_progress)
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("model.layers.1.self_attn.k_proj.weight").get_shape() == [128, 256]


def test_progress_grows_to_the_end(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf")
    seen: list[float | None] = []
    convert(tmp_path / "m.gguf", tmp_path / "out", lambda _, fraction: seen.append(fraction))
    shares = [fraction for fraction in seen if fraction is not None]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_bfloat16_is_the_nearest(bits: list[int]) -> None:
    values = np.array(bits, dtype=np.uint32).view(np.float32)
    result = to_bfloat16(values)
    back = (result.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(np.isnan(values), np.isnan(back))
    finite = np.isfinite(values) & np.isfinite(back)
    for neighbour in (result - 1, result + 1):
        other = (neighbour.astype(np.uint32) << 16).view(np.float32)
        near = np.abs(back[finite].astype(np.float64) - values[finite])
        far = np.abs(other[finite].astype(np.float64) - values[finite])
        worse = (near < far) | ((near == far) & (result[finite] % 2 == 0)) | np.isnan(far)
        assert worse.all()


def test_unreadable_quantisation_is_refused_by_name(tmp_path: Path) -> None:
    embedding = np.zeros((4, 256), dtype=np.int8)
    write_llama(tmp_path / "m.gguf", extra_tensors={"token_embd.weight": (embedding, GGMLQuantizationType.I8)})
    with pytest.raises(UnsupportedModel, match=r"token_embd\.weight is of type I8"):
        convert(tmp_path / "m.gguf", tmp_path / "out", ignore_progress)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "8 experts"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.rope.dimension_count": 16}, "rotating 16 of 32"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ({"tokenizer.ggml.pre": "some-new-one"}, "pre-tokenizer 'some-new-one'"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer of kind 'bert'"),
        ({"llama.block_count": 1}, r"no place for tensor blk\.1"),
        ({"llama.block_count": 0}, "0 layers"),
        ({"llama.block_count": 1 << 30}, "1073741824 layers"),
        ({"llama.block_count": 3}, r"tensor blk\.2\.attn_k\.weight is missing"),
        ({"llama.attention.head_count_kv": 2}, r"attn_k\.weight has 128 rows, but 2 heads of 32 need 64"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(tmp_path: Path, metadata: dict[str, object], message: str) -> None:
    write_llama(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(UnsupportedModel, match=message):
        convert(tmp_path / "m.gguf", tmp_path / "out", ignore_progress)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.attention.head_count": 0}, "makes no sense"),
        ({"llama.attention.head_count": "eight"}, "makes no sense"),
        ({"tokenizer.ggml.merges": ["ab"]}, "makes no sense"),
        ({"tokenizer.ggml.merges": ["a z"]}, "does not fit together"),
        ({"tokenizer.ggml.eos_token_id": 4}, "the eos token 4 is outside the vocabulary"),
    ],
)
def test_nonsense_in_the_header_is_a_message(tmp_path: Path, metadata: dict[str, object], message: str) -> None:
    write_llama(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(StartupFailed, match=message):
        convert(tmp_path / "m.gguf", tmp_path / "out", ignore_progress)


def test_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "mamba", TOKENIZER, {})
    with pytest.raises(UnsupportedModel, match=r"'mamba', which llmd does not convert\. It converts: exaone4, gemma2"):
        convert(tmp_path / "m.gguf", tmp_path / "out", ignore_progress)


@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_a_message_not_a_trace(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    whole = folder / "whole.gguf"
    if not whole.exists():
        write_llama(whole)
    content = bytearray(whole.read_bytes())
    if data.draw(st.booleans(), label="cut short"):
        content = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    else:
        for position in data.draw(st.lists(st.integers(0, 1500), min_size=1, max_size=8), label="positions"):
            content[position] = data.draw(st.integers(0, 255), label="byte")
    damaged = folder / "damaged.gguf"
    damaged.write_bytes(content)
    target = folder / "out"
    # a flipped byte may be in a value that means nothing here, and then the conversion ends well
    with suppress(StartupFailed):
        convert(damaged, target, ignore_progress)
        rmtree(target)
    assert not target.exists()


def _transformers_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"
    return f"{NAMES[parts[0]]}.{parts[1]}"


def _halves_apart(rows: NDArray[np.float32], *, head_dim: int) -> NDArray[np.float32]:
    """Undo what GGUF does to q and k, the slow way: row 2i of a head becomes row i, row 2i + 1 row i + head_dim / 2."""
    result = np.empty_like(rows)
    for row in range(len(rows)):
        head, place = divmod(row, head_dim)
        result[head * head_dim + place // 2 + (place % 2) * head_dim // 2] = rows[row]
    return result


def _raw_tensors(path: Path) -> dict[str, tuple[str, NDArray[np.unsignedinteger]]]:
    """Read by hand: name → (element type, bits)."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        words = np.frombuffer(content[begin:end], dtype=np.uint32 if entry["dtype"] == "F32" else np.uint16)
        tensors[name] = (entry["dtype"], words.reshape(entry["shape"]))
    return tensors


def _bits(values: NDArray[np.float32], dtype: str) -> NDArray[np.unsignedinteger]:
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    # gguf's own rounding
    return np.ascontiguousarray(quantize(values, GGMLQuantizationType.BF16)).view(np.uint16)
