"""The tokenizer in a GGUF file as `tokenizer.json`, `tokenizer_config.json` and their neighbours.

Two kinds: byte-level BPE ("gpt2": merges are listed) and SentencePiece BPE ("llama": pieces have scores).
"""

import re
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from llmd.errors import UnsupportedModel
from llmd.fetch.gguf.file import GgufFile
from llmd.fetch.gguf.pre_tokenizers import adds_bos, byte_level_parts

_SPACE = "▁"  # how SentencePiece writes a space
# tokens with which an answer ends, whatever the file names as its one end-of-sequence token
_END_TOKENS = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "[|endofturn|]",
    }
)
_NEVER_SWALLOW = frozenset({"<s>", "<unk>", "<|endoftext|>"})  # of Phi-3's special tokens
_FLAWED_NAME = re.compile(r"[^\w.-]", re.ASCII)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the folder gets."""

    tokenizer: str  # tokenizer.json
    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]
    chat_templates: dict[str, str]  # by name; the usual one is "default"


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    tokens: list[str]  # by id
    types: list[int]  # TokenType by id
    scores: list[float]  # by id; empty if there are none


def read_tokenizer(file: GgufFile) -> TokenizerFiles:
    """Raises UnsupportedModel, naming it, for a kind of tokenizer that cannot be rebuilt exactly."""
    kind = file.required("tokenizer.ggml.model")
    vocabulary = _read_vocabulary(file)
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(file, vocabulary)
        add_bos = adds_bos(file.required("tokenizer.ggml.pre"))
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(file, vocabulary)
        add_bos = True
    else:
        raise UnsupportedModel(f"{file.path} has a tokenizer of kind {kind!r}; llmd reads 'gpt2' (BPE) and 'llama'.")
    bos, eos = _special_token(file, vocabulary, "bos"), _special_token(file, vocabulary, "eos")
    add_bos = bos is not None and bool(file.metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    add_eos = eos is not None and bool(file.metadata.get("tokenizer.ggml.add_eos_token", False))
    _add_post_processor(tokenizer, bos=bos if add_bos else None, eos=eos if add_eos else None)
    return TokenizerFiles(
        tokenizer=tokenizer.to_str(),
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": add_bos,
            "add_eos_token": add_eos,
            "bos_token": bos,
            "eos_token": eos,
            "unk_token": _special_token(file, vocabulary, "unknown"),
            "pad_token": _special_token(file, vocabulary, "padding"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": file.required_setting("context_length"),
        },
        generation_config=_generation_config(file, vocabulary),
        chat_templates=_chat_templates(file),
    )


def _read_vocabulary(file: GgufFile) -> _Vocabulary:
    tokens = file.required("tokenizer.ggml.tokens")
    types = file.metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    scores = file.metadata.get("tokenizer.ggml.scores", [])
    if len(types) != len(tokens) or len(scores) not in (0, len(tokens)):
        raise UnsupportedModel(f"{file.path}: tokens, their types and their scores are not equally many.")
    return _Vocabulary(tokens, types, scores)


def _byte_level_bpe(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    parts = byte_level_parts(file.required("tokenizer.ggml.pre"))
    pairs = (merge.split(" ", 1) for merge in file.required("tokenizer.ggml.merges"))
    merges = [(left, right) for left, right in pairs]
    tokenizer = _bpe(file, vocabulary, merges, ignore_merges=parts.ignore_merges)
    if parts.normalizer is not None:
        tokenizer.normalizer = parts.normalizer
    tokenizer.pre_tokenizer = parts.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, vocabulary)
    return tokenizer


def _sentencepiece_bpe(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    if not vocabulary.scores:
        raise UnsupportedModel(f"{file.path} lacks the metadata key tokenizer.ggml.scores.")
    add_prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer = _bpe(
        file,
        vocabulary,
        _merges_of_pieces(vocabulary),
        unk_token=_special_token(file, vocabulary, "unknown"),
        fuse_unk=True,
        byte_fallback=TokenType.BYTE in vocabulary.types,
    )
    prefix = [normalizers.Prepend(_SPACE)] if add_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if add_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    # Phi-3's special tokens swallow the white space after them, which GGUF does not record
    _add_tokens(tokenizer, vocabulary, swallow_space=file.architecture == "phi3")
    return tokenizer


def _bpe(file: GgufFile, vocabulary: _Vocabulary, merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(BPE(_ids(vocabulary), merges, **options))
    except Exception as error:
        # the library raises nothing more special
        raise UnsupportedModel(f"{file.path}: the tokenizer does not fit together: {error}.") from error


def _merges_of_pieces(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The merges that make BPE choose as SentencePiece does: the pair that makes the piece with the highest score.

    A piece can come from several pairs; SentencePiece takes the leftmost in the text, which for the runs where that
    matters ("a" "aa" "aaa") is the pair with the longer left half.
    """
    pieces = {
        token: score
        for token, kind, score in zip(vocabulary.tokens, vocabulary.types, vocabulary.scores, strict=True)
        if kind == TokenType.NORMAL
    }
    ranked = [
        (-score, -split, piece)
        for piece, score in pieces.items()
        for split in range(1, len(piece))
        if piece[:split] in pieces and piece[split:] in pieces
    ]
    ranked.sort(key=lambda merge: merge[:2])
    return [(piece[:-minus], piece[-minus:]) for _, minus, piece in ranked]


def _ids(vocabulary: _Vocabulary) -> dict[str, int]:
    ids: dict[str, int] = {}
    for token_id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        # rows of the embedding that stand for nothing; the converter had to give them a name
        if kind == TokenType.UNUSED and token == f"[PAD{token_id}]":
            continue
        ids.setdefault(token, token_id)
    return ids


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary, *, swallow_space: bool = False) -> None:
    """Tokens that are found in the text before anything else; special ones can be left out when decoding."""
    special = [*_of_type(vocabulary, TokenType.UNKNOWN), *_of_type(vocabulary, TokenType.CONTROL)]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True, rstrip=swallow_space and token not in _NEVER_SWALLOW)
            for token in special
        ]
    )
    defined = _of_type(vocabulary, TokenType.USER_DEFINED)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in defined])


def _of_type(vocabulary: _Vocabulary, kind: TokenType) -> list[str]:
    return [token for token, its_kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if its_kind == kind]


def _special_token(file: GgufFile, vocabulary: _Vocabulary, name: str) -> str | None:
    token_id: int | None = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None:
        return None
    if token_id >= len(vocabulary.tokens):
        raise UnsupportedModel(f"{file.path}: the {name} token {token_id} is outside the vocabulary.")
    return vocabulary.tokens[token_id]


def _add_post_processor(tokenizer: Tokenizer, *, bos: str | None, eos: str | None) -> None:
    before, after = ([bos] if bos else []), ([eos] if eos else [])
    if not before and not after:
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
    )


def _generation_config(file: GgufFile, vocabulary: _Vocabulary) -> dict[str, Any]:
    named = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    marked = (TokenType.CONTROL, TokenType.USER_DEFINED)
    ends = [
        token_id
        for token_id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in marked and token in _END_TOKENS
    ]
    eos_ids = list(dict.fromkeys(token_id for token_id in [*named, *ends] if token_id is not None))
    ids = {
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_ids,
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in ids.items() if value not in (None, [])}


def _chat_templates(file: GgufFile) -> dict[str, str]:
    templates = {}
    if template := file.metadata.get("tokenizer.chat_template"):
        templates["default"] = template
    for name in file.metadata.get("tokenizer.chat_templates", []):
        if template := file.metadata.get(f"tokenizer.chat_template.{name}"):
            # it becomes a file's name
            templates[_FLAWED_NAME.sub("_", name)] = template
    return templates
