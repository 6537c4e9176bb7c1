"""Small tokenizers of the two kinds that models have, trained on a few lines and written as model folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import settings
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from llmd.text.tokenizer import Tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock, they said; they said so twice!",
    "def fox(jump):\n    return jump + 1\n\n\nprint(fox(41))  # the quick one",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "你好，世界。今天天气很好。 こんにちは世界 안녕하세요",
]

# A slow machine is no failure.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

WriteFolder = Callable[..., Path]


def byte_level_json() -> dict[str, Any]:
    """A byte-level BPE tokenizer (GPT-2's kind) with ChatML's special tokens, as tokenizer.json."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    backend.add_tokens([AddedToken("<tool call>", special=False, normalized=False)])
    description: dict[str, Any] = json.loads(backend.to_str())
    return description


def byte_fallback_json() -> dict[str, Any]:
    """A SentencePiece-like BPE tokenizer (Llama 2's kind): `▁` for spaces, unknown characters as bytes."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(LINES[:3], trainer)
    description: dict[str, Any] = json.loads(backend.to_str())
    vocabulary = description["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    description["model"]["byte_fallback"] = True
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    description["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return description


@pytest.fixture(scope="session")
def write_folder(tmp_path_factory: pytest.TempPathFactory) -> WriteFolder:
    """Writes a model folder: keywords are file names without ".json" and their contents."""

    def write(**files: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def byte_level_folder(write_folder: WriteFolder) -> Path:
    return write_folder(tokenizer=byte_level_json(), tokenizer_config={"eos_token": "<|im_end|>"})


@pytest.fixture(scope="session")
def byte_fallback_folder(write_folder: WriteFolder) -> Path:
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": False}
    return write_folder(tokenizer=byte_fallback_json(), tokenizer_config=config)


@pytest.fixture(scope="session")
def byte_level(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_folder)


@pytest.fixture(scope="session")
def byte_fallback(byte_fallback_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_fallback_folder)


@pytest.fixture(scope="session")
def metaspace(write_folder: WriteFolder) -> Tokenizer:
    """As byte_fallback, but decoded by Metaspace, which leaves byte tokens as they are written."""
    description = byte_fallback_json()
    description["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return Tokenizer.load(write_folder(tokenizer=description))


@pytest.fixture(scope="session", params=["byte_level", "byte_fallback", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind of tokenizer in turn."""
    found: Tokenizer = request.getfixturevalue(request.param)
    return found
