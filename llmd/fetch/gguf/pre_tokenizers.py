"""How text is cut into words before byte-level BPE, by the name that GGUF gives to it (`tokenizer.ggml.pre`).

The patterns are data of the models: they stand in the tokenizer.json of the model that each is named after.
"""

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from llmd.errors import UnsupportedModel

# Llama 3, after OpenAI's cl100k; {1,3}: numbers are cut into up to three digits
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# letters of one case after the other: "HelloWorld" is two words
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2_NAMES = frozenset({"gpt-2", "phi-2", "olmo", "exaone4"})
_SINGLE_DIGIT_NAMES = frozenset({"smollm", "refact", "starcoder", "command-r", "exaone"})
_LLAMA3_NAMES = frozenset({"llama3", "llama-v3", "llama-bpe"})
_PATTERNS = {
    **dict.fromkeys(_LLAMA3_NAMES, _LLAMA3),
    "smaug-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
    "gpt-4o": _GPT4O,
}
# a word that is a token is taken whole, without looking at the merges
_WHOLE_WORDS = _LLAMA3_NAMES | {"tekken"}


@dataclass(frozen=True, slots=True)
class ByteLevelParts:
    """What surrounds the BPE model."""

    pre_tokenizer: pre_tokenizers.PreTokenizer
    normalizer: normalizers.Normalizer | None
    ignore_merges: bool  # a word that is a token is taken whole


def byte_level_parts(name: str) -> ByteLevelParts:
    """The parts by GGUF's name. Raises UnsupportedModel, naming it, if it is not known."""
    return ByteLevelParts(
        pre_tokenizer=_pre_tokenizer(name),
        normalizer=normalizers.NFC() if _PATTERNS.get(name) is _QWEN2 else None,
        ignore_merges=name in _WHOLE_WORDS,
    )


def adds_bos(name: str) -> bool:
    """Whether a prompt begins with the BOS token where the file does not say."""
    return name in _WHOLE_WORDS


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _GPT2_NAMES:
        return whole
    if name in _SINGLE_DIGIT_NAMES:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    if name in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[name]), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, bytes_only])
    known = ", ".join(sorted(_GPT2_NAMES | _SINGLE_DIGIT_NAMES | _PATTERNS.keys()))
    raise UnsupportedModel(f"The pre-tokenizer {name!r} of this GGUF file is not known. Known are: {known}.")
