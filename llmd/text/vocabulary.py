"""Token id → the bytes it stands for. Knows tokenizer.json's decoders; must not know of texts or requests.

Byte-level vocabularies (GPT-2 and most models since) and SentencePiece ones with byte fallback (Llama 2, Mistral,
Gemma) both turn a token into bytes without looking at its neighbours. Only the start of a text differs: SentencePiece
tokenizers put a space before the first word and take it away again when they decode.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from llmd.errors import UnsupportedModel

_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# One step of the decoder that works on a single token: text → text, or the token's final bytes.
TokenStep = Callable[[str], str | bytes]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 stands for itself, the rest for U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        # An added token with a space or the like in it is written as itself.
        return token.encode()


def _byte_fallback(token: str) -> str | bytes:
    match = _FALLBACK_BYTE.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token


@dataclass(frozen=True, slots=True)
class TextStart:
    """What decoding takes away at the start of a text."""

    stripped: bytes = b""  # this, if the text begins with it …
    max_stripped: int = 0  # … at most so many times
    dropped: bytes = b""  # this, wherever it is in the first token


class Vocabulary:
    """The tokens of one tokenizer, as bytes. Ids that it does not have stand for no bytes."""

    def __init__(self, tokenizer: Tokenizer, *, decoder: dict[str, Any] | None) -> None:
        """`decoder`: as in tokenizer.json. Raises UnsupportedModel if its tokens do not stand for fixed bytes."""
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._steps, self.text_start = _parse_decoder(decoder)
        self._bytes: dict[int, bytes] = {}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.size = max(tokenizer.get_vocab_size(), *(token_id + 1 for token_id in added), 0)
        # as tokenizer.json spells it: never fewer characters than the token stands for in a text
        self.longest_token = max(map(len, tokenizer.get_vocab()), default=1)

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes inside a text, special tokens included; not always whole characters."""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._decode(token_id)
        return data

    def _decode(self, token_id: int) -> bytes:
        token: str | bytes | None = self._tokenizer.id_to_token(token_id) if 0 <= token_id < self.size else None
        if token is None:
            return b""
        for step in self._steps:
            if isinstance(token, bytes):
                return token
            token = step(token)
        return token if isinstance(token, bytes) else token.encode()


def _parse_decoder(decoder: dict[str, Any] | None) -> tuple[list[TokenStep], TextStart]:
    """tokenizer.json's decoder as steps on one token, and what it does at the start of a text."""
    if decoder is None:
        raise UnsupportedModel("tokenizer.json has no decoder, so llmd cannot turn its tokens into text")
    steps: list[TokenStep] = []
    start = TextStart()
    fused = False
    for part in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        match part:
            case {"type": "ByteLevel"} if not fused:
                steps.append(_byte_level)
                fused = True
            case {"type": "ByteFallback"} if not fused:
                steps.append(_byte_fallback)
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not fused:
                steps.append(_replacement(old, new))
            case {"type": "Metaspace", "replacement": str(mark)} if not fused:
                steps.append(_replacement(mark, " "))
                start = TextStart(dropped=b"" if part.get("prepend_scheme") == "never" else b" ")
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": str(mark), "start": int(count), "stop": 0} if fused:
                start = TextStart(stripped=mark.encode(), max_stripped=count)
            case _:
                raise UnsupportedModel(f"tokenizer.json has a decoder that llmd cannot stream: {part}")
    return steps, start


def _replacement(old: str, new: str) -> TokenStep:
    return lambda token: token.replace(old, new)
