"""Tokenizers rebuilt from GGUF metadata, against the tokenizer that the metadata came from or a plain algorithm."""

import json
import tempfile
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from llmd.fetch.gguf.file import GgufFile
from llmd.fetch.gguf.tokenizer import TokenizerFiles, read_tokenizer
from tests.fetch.gguf_files import F32, write_gguf

CORPUS = [
    *Path(__file__).read_text(encoding="utf-8").splitlines(),
    "Der Fuß überquert die Straße; 12345 Äpfel, naïve café, don't DON'T we'll",
    "数字 123 と 日本語のテキスト、そして emoji 🙂🙂 🏳️‍🌈",
    "    indented\n\n\n\ttabs\r\n  trailing   ",
]
END = "<|im_end|>"
Pieces = tuple[tuple[str, float, int], ...]  # (piece, score, type) by id
LETTERS = "abehilnostw Tüé0123456789'.,\n\t 日🙂"
texts = st.one_of(st.text(max_size=60), st.text(alphabet=LETTERS, max_size=80), st.sampled_from(CORPUS))
# tokens in angle brackets are found before SentencePiece sees the text
plain_texts = texts.filter(lambda text: "<" not in text)

DIGITS = pre_tokenizers.Digits(individual_digits=True)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# as in the tokenizer.json of Llama 3 and of Qwen 2
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {
    "gpt-2": (None, GPT2),
    "smollm": (None, pre_tokenizers.Sequence([DIGITS, GPT2])),
    "llama-bpe": (None, pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES])),
    "qwen2": (normalizers.NFC(), pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES])),
}


@cache
def byte_level_pair(pre: str) -> tuple[Tokenizer, Tokenizer]:
    """A trained tokenizer, and the one that its GGUF metadata gives."""
    original = Tokenizer(BPE())
    normalizer, original.pre_tokenizer = BYTE_LEVEL[pre]
    if normalizer is not None:
        original.normalizer = normalizer
    original.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    original.train_from_iterator(CORPUS, trainer)
    return original, Tokenizer.from_str(_read(_byte_level_metadata(original, pre)).tokenizer)


@pytest.mark.parametrize("pre", BYTE_LEVEL)
@settings(deadline=None)
@given(text=texts)
def test_byte_level_bpe_encodes_like_its_source(pre: str, text: str) -> None:
    original, converted = byte_level_pair(pre)
    for marked in (text, f"{END}{text} {END}\n{text}"):
        expected = original.encode(marked, add_special_tokens=False).ids
        assert converted.encode(marked, add_special_tokens=False).ids == expected
        assert converted.decode(expected, skip_special_tokens=False) == original.decode(expected, False)


@settings(deadline=None)
@given(text=plain_texts)
def test_sentencepiece_encodes_like_sentencepiece(text: str) -> None:
    pieces, converted = sentencepiece_pair()
    assert converted.encode(text, add_special_tokens=False).ids == _sentencepiece_ids(pieces, text)


@settings(deadline=None)
@given(text=plain_texts)
def test_sentencepiece_gives_the_text_back(text: str) -> None:
    _, converted = sentencepiece_pair()
    ids = converted.encode(text, add_special_tokens=False).ids
    # the space mark itself is the one character that SentencePiece cannot tell from a space
    assert converted.decode(ids) == text.replace("▁", " ")


def test_special_tokens_flags_and_ends(tmp_path: Path) -> None:
    metadata = _sentencepiece_metadata(_pieces())
    metadata |= {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eot_token_id": 5}
    files = _read(metadata)
    tokenizer = Tokenizer.from_str(files.tokenizer)
    assert tokenizer.encode("a").ids[0] == 1
    assert tokenizer.encode("a").ids[-1] == 2
    assert tokenizer.decode(tokenizer.encode("a").ids) == "a"
    assert files.tokenizer_config["bos_token"] == "<s>"
    assert files.tokenizer_config["add_bos_token"] is True
    assert files.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 5, 3]}


def test_user_defined_tokens_keep_their_spaces() -> None:
    # Gemma's runs of spaces, which the file holds as they are in the text
    tokens = [*_pieces(), ("  ", -1000.0, TokenType.USER_DEFINED), ("    ", -1000.0, TokenType.USER_DEFINED)]
    metadata = _sentencepiece_metadata(tokens) | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = Tokenizer.from_str(_read(metadata).tokenizer)
    two, four = len(tokens) - 2, len(tokens) - 1
    ids = tokenizer.encode("t    t  t", add_special_tokens=False).ids
    assert [token_id for token_id in ids if token_id in (two, four)] == [four, two]
    assert tokenizer.decode(ids) == "t    t  t"


def test_phi3s_special_tokens_swallow_the_space_after_them() -> None:
    metadata = _sentencepiece_metadata(_pieces()) | {"tokenizer.ggml.add_space_prefix": False}
    encoded = {}
    for architecture in ("phi3", "llama"):
        tokenizer = Tokenizer.from_str(_read(metadata, architecture).tokenizer)
        encoded[architecture] = [tokenizer.encode(text).ids for text in (f"{END}\nt", f"{END}t", "<s> t", "<s>t")]
    assert encoded["phi3"][0] == encoded["phi3"][1]
    assert encoded["phi3"][2] != encoded["phi3"][3]
    assert encoded["llama"][0] != encoded["llama"][1]


def test_padding_rows_are_no_tokens() -> None:
    original, _ = byte_level_pair("gpt-2")
    metadata = _byte_level_metadata(original, "gpt-2")
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"].append(f"[PAD{size}]")
    metadata["tokenizer.ggml.token_type"].append(TokenType.UNUSED)
    tokenizer = Tokenizer.from_str(_read(metadata).tokenizer)
    assert tokenizer.get_vocab_size() == size
    assert tokenizer.decode([size]) == ""


def test_chat_templates_by_name() -> None:
    metadata = _sentencepiece_metadata(_pieces())
    metadata |= {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_templates": ["tool_use", "../escape"],
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.chat_template.../escape": "outside",
    }
    templates = _read(metadata).chat_templates
    assert templates == {"default": "plain", "tool_use": "tools", ".._escape": "outside"}


def _byte_level_metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    content = json.loads(tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [
            TokenType.CONTROL if token == END else TokenType.NORMAL for token, _ in vocabulary
        ],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


@cache
def sentencepiece_pair() -> tuple[Pieces, Tokenizer]:
    pieces = _pieces()
    return pieces, Tokenizer.from_str(_read(_sentencepiece_metadata(pieces)).tokenizer)


@cache
def _pieces() -> Pieces:
    """A SentencePiece BPE vocabulary: (piece, score, type); the earlier a piece was learned, the higher its score."""
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    # a piece never spans words: SentencePiece's split_by_whitespace
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    merges = json.loads(trained.to_str())["model"]["merges"]
    learned = list(dict.fromkeys("".join(merge) for merge in merges))
    single = sorted(token for token in trained.get_vocab() if len(token) == 1 and token not in "日🙂")
    special = [("<unk>", 0.0, TokenType.UNKNOWN), ("<s>", 0.0, TokenType.CONTROL), ("</s>", 0.0, TokenType.CONTROL)]
    special += [(END, -1000.0, TokenType.CONTROL), ("<tool>", -1000.0, TokenType.USER_DEFINED)]
    special += [("<eot>", -1000.0, TokenType.CONTROL)]
    byte_pieces = [(f"<0x{byte:02X}>", 0.0, TokenType.BYTE) for byte in range(256)]
    normal = [(piece, float(-rank), TokenType.NORMAL) for rank, piece in enumerate([*learned, *single])]
    return (*special, *byte_pieces, *normal)


def _sentencepiece_metadata(pieces: Iterable[tuple[str, float, int]]) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece for piece, _, _ in pieces],
        "tokenizer.ggml.scores": [score for _, score, _ in pieces],
        "tokenizer.ggml.token_type": [int(kind) for _, _, kind in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _sentencepiece_ids(pieces: Pieces, text: str) -> list[int]:
    """SentencePiece's BPE, slow and plain: join the best pair, the leftmost if equal."""
    scores = {piece: score for piece, score, kind in pieces if kind == TokenType.NORMAL}
    ids = {piece: token_id for token_id, (piece, _, _) in enumerate(pieces)}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    result = []
    for symbol in symbols:
        known = [ids[symbol]] if symbol in scores else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        result += known
    return result


def _read(metadata: dict[str, Any], architecture: str = "llama") -> TokenizerFiles:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.gguf"
        # the tokenizer needs no weights, but a file without any is not laid out to the end
        weights = {"t": (np.zeros(1, np.float32), F32)}
        write_gguf(path, architecture, {f"{architecture}.context_length": 64, **metadata}, weights)
        return read_tokenizer(GgufFile(path))
