"""One answer's text, from its tokens: the one machine behind streamed and whole answers (contract C6).

Tokens are taken one by one, so that nothing depends on how the engine grouped them into steps. Must not know of HTTP.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from llmd.protocol.generation import FinishReason
from llmd.text.detokenizer import Detokenizer
from llmd.text.stop_strings import StopStrings
from llmd.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one push adds to the answer."""

    text: str  # safe to show
    num_tokens: int  # how many of the pushed tokens belong to the answer
    text_offsets: list[int]  # for each of those: characters of text before it (see TextOutput)
    finish_reason: FinishReason | None = None  # not None: the answer has ended
    stop_reason: str | int | None = None  # the stop string, or the client's stop token, that ended it


class TextOutput:
    """Detokenizes one answer, ends it at stop strings and says which tokens count.

    A token's text offset is the number of characters that the tokens before it gave, unfinished characters not
    counted and stop strings not cut: it never falls, and may lie behind the end of a text that a stop string cut.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        stop_token_ids: Collection[int] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        """`stop_token_ids`: those that the client named, to be reported as `stop_reason`; the model's own
        end-of-sequence tokens are not. `min_tokens`: stop strings that are complete within so many tokens do not
        count."""
        self._detokenizer = Detokenizer(
            tokenizer.vocabulary, prompt_token_ids=prompt_token_ids, skip_special_tokens=skip_special_tokens
        )
        self._stop_strings = StopStrings(stop, include=include_stop_str_in_output)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_characters = 0
        self._has_ended = False

    def push(self, token_ids: Sequence[int], *, finish: FinishReason | None) -> TextDelta:
        """Takes the answer's next tokens.

        `finish`: why the engine ended it, if it did. After FinishReason.STOP the last token is a stop token, whose
        text is not shown unless stop strings are. Tokens behind a completed stop string are not taken; the caller
        cancels the request then. Raises RuntimeError after the end.
        """
        if self._has_ended:
            raise RuntimeError("the answer has ended; nothing may follow")
        texts: list[str] = []
        text_offsets: list[int] = []
        for index, token_id in enumerate(token_ids, start=1):
            text_offsets.append(self._num_characters)
            self._num_tokens += 1
            is_stop_token = finish is FinishReason.STOP and index == len(token_ids)
            is_hidden = is_stop_token and not self._include_stop
            stop = self._add("" if is_hidden else self._detokenizer.push(token_id), texts)
            if stop is not None:
                return self._end(texts, text_offsets, FinishReason.STOP, stop)
        if finish is None:
            return TextDelta("".join(texts), len(token_ids), text_offsets)
        stop = self._add(self._detokenizer.finish(), texts)
        if stop is not None:
            return self._end(texts, text_offsets, FinishReason.STOP, stop)
        texts.append(self._stop_strings.finish())
        return self._end(texts, text_offsets, finish, self._stop_reason(token_ids, finish))

    def _add(self, text: str, texts: list[str]) -> str | None:
        """Puts what may be shown of `text` into `texts`; the stop string, if one is complete."""
        if not text:
            return None
        self._num_characters += len(text)
        match = self._stop_strings.push(text, is_active=self._num_tokens > self._min_tokens)
        texts.append(match.text)
        return match.stop

    def _stop_reason(self, token_ids: Sequence[int], finish: FinishReason) -> int | None:
        """The stop token that ended the answer, if the client had named it."""
        is_named = finish is FinishReason.STOP and len(token_ids) > 0 and token_ids[-1] in self._stop_token_ids
        return token_ids[-1] if is_named else None

    def _end(
        self, texts: list[str], text_offsets: list[int], finish_reason: FinishReason, stop_reason: str | int | None
    ) -> TextDelta:
        self._has_ended = True
        return TextDelta("".join(texts), len(text_offsets), text_offsets, finish_reason, stop_reason)
