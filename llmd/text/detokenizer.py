"""Token ids → text, a token at a time. Never shows half a character; knows nothing of stop strings or requests."""

from codecs import utf_8_decode
from collections.abc import Iterable, Sequence

from llmd.text.vocabulary import Vocabulary

# A character that is not whole yet has at most three bytes.
_MAX_PARTIAL_BYTES = 3


class Detokenizer:
    """Pushes in, text out: the pieces, put together, are the text of all the tokens, however they were split.

    Bytes that are not UTF-8 become U+FFFD, one for each maximal part of a character, as the Unicode standard (3.9)
    recommends. For byte-level vocabularies that is exactly what `tokenizers` decodes. For byte fallback, `tokenizers`
    replaces a whole run of byte tokens, whole characters included, if any byte of it is wrong; no stream can do that
    (it would have to take back what it has shown), so here the whole characters stay.
    """

    def __init__(
        self, vocabulary: Vocabulary, *, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        """`prompt_token_ids`: what the text goes on from. Its last tokens decide whether a leading space stays, and
        give the first bytes of a character that the prompt left unfinished."""
        self._token_bytes = vocabulary.token_bytes
        self._skipped = vocabulary.special_ids if skip_special_tokens else frozenset[int]()
        self._text_start = vocabulary.text_start
        self._num_strippable = vocabulary.text_start.max_stripped
        tail = self._last_bytes(prompt_token_ids)
        self._at_start = not tail
        self._partial = _partial_character(tail)
        self._partial_is_prompt = bool(self._partial)

    def push(self, token_id: int) -> str:
        """The text that is certain after this token; "" while a character is unfinished."""
        if token_id in self._skipped:
            return ""
        data = self._token_bytes(token_id)
        if self._at_start:
            data = self._strip_start(data)
        if self._partial_is_prompt and data:
            self._take_over_partial(data)
        if self._partial:
            data = self._partial + data
        text, num_decoded = utf_8_decode(data, "replace", False)
        self._partial = data[num_decoded:]
        return text

    def finish(self) -> str:
        """What is left: U+FFFD for an unfinished character, else nothing."""
        partial = b"" if self._partial_is_prompt else self._partial
        self._partial = b""
        return partial.decode("utf-8", "replace")

    def _last_bytes(self, token_ids: Sequence[int]) -> bytes:
        """The last bytes of these tokens' text: enough to hold a whole character, or all there are."""
        tail = b""
        for token_id in reversed(token_ids):
            if len(tail) > _MAX_PARTIAL_BYTES:
                break
            if token_id not in self._skipped:
                tail = self._token_bytes(token_id) + tail
        return tail

    def _strip_start(self, data: bytes) -> bytes:
        """The bytes of a token at the start of a text, without the space that encoding had put there."""
        rule = self._text_start
        if rule.dropped and data:
            self._at_start = False
            return data.replace(rule.dropped, b"")
        while self._num_strippable and data.startswith(rule.stripped):
            data = data[len(rule.stripped) :]
            self._num_strippable -= 1
        self._at_start = not data
        return data

    def _take_over_partial(self, data: bytes) -> None:
        """The prompt's unfinished character becomes ours only if our first byte goes on with it."""
        self._partial_is_prompt = False
        is_continuation = data[0] & 0b1100_0000 == 0b1000_0000
        if not is_continuation:
            self._partial = b""


def decode(vocabulary: Vocabulary, token_ids: Iterable[int], *, skip_special_tokens: bool) -> str:
    """The text of all these tokens, from the same machine."""
    detokenizer = Detokenizer(vocabulary, skip_special_tokens=skip_special_tokens)
    return "".join(map(detokenizer.push, token_ids)) + detokenizer.finish()


def _partial_character(data: bytes) -> bytes:
    """The bytes at the end that could begin a character and do not finish it."""
    return data[utf_8_decode(data, "replace", False)[1] :]
