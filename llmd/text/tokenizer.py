"""Text ↔ token ids for one model folder. Knows the folder's tokenizer files; must not know of requests or HTTP."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from llmd.errors import InvalidRequest, StartupFailed
from llmd.text import detokenizer
from llmd.text.vocabulary import Vocabulary

# The tokens that tokenizer_config.json gives a role, by which chat templates call them too.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A Hugging Face tokenizer: tokenizer.json, with what tokenizer_config.json and its neighbours say about it.

    Safe to use from several threads at once. `clean_up_tokenization_spaces` has no effect: it rewrites text that a
    stream has already shown, and would make streamed and whole answers differ.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        vocabulary: Vocabulary,
        named_tokens: dict[str, str],
        eos_token_ids: frozenset[int],
    ) -> None:
        """Use `Tokenizer.load`."""
        self._backend = backend
        self.vocabulary = vocabulary
        self.named_tokens = named_tokens  # "bos_token" → its text, and so on, for chat templates
        self.eos_token_ids = eos_token_ids  # any of them ends an answer

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Reads the folder. Raises StartupFailed, naming the file, if one is missing or broken."""
        backend, decoder = _read_tokenizer(folder / "tokenizer.json")
        config = _read_json(folder / "tokenizer_config.json")
        named_tokens = _named_tokens(config, _read_json(folder / "special_tokens_map.json"))
        _declare_tokens(backend, config.get("added_tokens_decoder", {}), named_tokens)
        _set_bos_and_eos(backend, config, named_tokens)
        # A file may ask for cutting and padding, which is for training.
        backend.no_truncation()
        backend.no_padding()
        return cls(
            backend,
            vocabulary=Vocabulary(backend, decoder=decoder),
            named_tokens=named_tokens,
            eos_token_ids=_eos_token_ids(folder, backend, named_tokens),
        )

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return self.vocabulary.size

    @property
    def longest_token(self) -> int:
        """In characters: a text has at least its length divided by this many tokens."""
        return self.vocabulary.longest_token

    @property
    def special_ids(self) -> frozenset[int]:
        return self.vocabulary.special_ids

    @property
    def bos_token(self) -> str | None:
        return self.named_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.named_tokens.get("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids. Special tokens written in the text are recognised either way.

        `add_special_tokens`: what the tokenizer puts around a text (mostly BOS in front) is added; not for the
        output of a chat template, which writes them itself. Raises InvalidRequest for text that is not Unicode.
        """
        (token_ids,) = self.encode_many([text], add_special_tokens=add_special_tokens)
        return token_ids

    def encode_many(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """The same for many texts, on as many threads as there are cores. Other threads of this process go on."""
        try:
            # the library's `encode` holds the interpreter lock from beginning to end, whatever thread it runs in
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError:
            raise _not_unicode() from None
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of these tokens, as a stream of them would show it. Ids that are no tokens have no text."""
        return detokenizer.decode(self.vocabulary, token_ids, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it ("<|im_end|>"), if there is one."""
        return self._backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """Exactly the bytes that the token adds to a text; special tokens give their name."""
        return self.vocabulary.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """The token by itself, for people; U+FFFD for bytes that are no whole character."""
        return self.vocabulary.token_bytes(token_id).decode("utf-8", "replace")


def _not_unicode() -> InvalidRequest:
    return InvalidRequest("The text holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character.")


class _Description(msgspec.Struct):
    """Of tokenizer.json, what the library does not tell."""

    decoder: dict[str, Any] | None = None


def _read_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any] | None]:
    """tokenizer.json as the library's object, and its decoder as it is written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StartupFailed(
            f"{path} is missing ({error.strerror}): llmd needs the model's fast tokenizer. Download it with the model, "
            "or make it with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        ) from error
    try:
        return tokenizers.Tokenizer.from_buffer(content), msgspec.json.decode(content, type=_Description).decoder
    except Exception as error:  # the library raises bare Exception
        raise StartupFailed(f"{path} cannot be read as a tokenizer: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StartupFailed(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise StartupFailed(f"{path} does not hold a JSON object")
    return content


def _named_tokens(config: dict[str, Any], special_tokens_map: dict[str, Any]) -> dict[str, str]:
    """bos_token and the like: a string, or an object with its "content"; tokenizer_config.json has the first word."""
    found: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        token = config.get(name) or special_tokens_map.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _declare_tokens(backend: tokenizers.Tokenizer, declared: dict[str, Any], named_tokens: dict[str, str]) -> None:
    """Makes the tokens that tokenizer_config.json declares, and tokenizer.json does not, known as whole tokens.

    A token that the vocabulary does not have, or has under another id, is left out: better read as plain text than
    as an id for which the model has no row.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    next_id = backend.get_vocab_size()
    for token_id, token in sorted((int(key), value) for key, value in declared.items()):
        current = backend.token_to_id(token["content"])
        if token["content"] not in known and token_id == (next_id if current is None else current):
            backend.add_tokens([AddedToken(**{key: value for key, value in token.items() if key in _TOKEN_FIELDS})])
            known.add(token["content"])
            next_id = backend.get_vocab_size()
    for content in named_tokens.values():
        if content not in known and backend.token_to_id(content) is not None:
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])
            known.add(content)


_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def _set_bos_and_eos(backend: tokenizers.Tokenizer, config: dict[str, Any], named_tokens: dict[str, str]) -> None:
    """add_bos_token and add_eos_token, where given, replace what tokenizer.json puts around a text."""
    if config.get("add_bos_token") is None and config.get("add_eos_token") is None:
        return
    bos = named_tokens.get("bos_token") if config.get("add_bos_token") else None
    eos = named_tokens.get("eos_token") if config.get("add_eos_token") else None
    ids = {token: backend.token_to_id(token) for token in (bos, eos) if token is not None}
    unknown = [token for token, token_id in ids.items() if token_id is None]
    if unknown:
        raise StartupFailed(
            f"tokenizer_config.json wants {unknown[0]!r} around texts; tokenizer.json has no such token"
        )
    pieces = [piece for piece in (bos, "$A", eos) if piece is not None]
    backend.post_processor = TemplateProcessing(single=pieces, pair=[*pieces, "$B:1"], special_tokens=list(ids.items()))


def _eos_token_ids(folder: Path, backend: tokenizers.Tokenizer, named_tokens: dict[str, str]) -> frozenset[int]:
    """All the ids that any of the folder's files calls an end of sequence."""
    config = _read_json(folder / "config.json")
    ids = set[int]()
    for source in (_read_json(folder / "generation_config.json"), config, config.get("text_config", {})):
        value = source.get("eos_token_id")
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    named = backend.token_to_id(named_tokens["eos_token"]) if "eos_token" in named_tokens else None
    return frozenset(ids if named is None else ids | {named})
