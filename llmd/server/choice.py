"""One choice of an answer while it grows: events of the engine in, deltas that may be shown out.

It must not know the engine, the other choices, or how a chat or a completion looks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from llmd.errors import EngineFailed
from llmd.protocol.generation import FinishReason, TokenEvent, TokenLogprobs
from llmd.server.context import TextModel
from llmd.server.openai_responses import AnswerFinish
from llmd.server.parameters import stop_strings
from llmd.server.question import Question
from llmd.text.output import TextOutput


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token of a choice, as its log-probabilities are reported."""

    token_id: int
    offset: int  # characters of the choice's text before it
    logprobs: TokenLogprobs | None  # None for the first token of an echoed prompt: nothing stands before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one choice has new and may be shown."""

    index: int
    is_first: bool
    text: str
    tokens: list[ShownToken]  # empty unless log-probabilities are asked
    token_ids: list[int]  # drawn since the last delta, whether they show or not
    finish_reason: AnswerFinish | None
    stop_reason: str | int | None  # the stop string, or the client's own stop token


def summed(deltas: Sequence[Delta]) -> Delta:
    """All that the deltas of one choice say, in one."""
    return Delta(
        index=deltas[-1].index,
        is_first=True,
        text="".join([delta.text for delta in deltas]),
        tokens=[token for delta in deltas for token in delta.tokens],
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )


class Choice:
    """One choice: tokens in, text that is safe to show out."""

    def __init__(self, text: TextModel, question: Question, index: int) -> None:
        self.index = index
        self.prompt = question.prompts[index // question.request.n]
        self.sampling = question.sampling[index // question.request.n]
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.is_finished = False
        self.ended_by: str | None = None
        self.last_event_at: float | None = None
        self.first_token_seconds: float | None = None
        self._request = question.request
        self._is_first = True
        self._echo = self.prompt.echo.text if self.prompt.echo is not None else ""
        self._output = TextOutput(
            text.tokenizer,
            prompt_token_ids=self.prompt.token_ids,
            stop=stop_strings(question.request),
            stop_token_ids=question.request.stop_token_ids,
            include_stop_str_in_output=question.request.include_stop_str_in_output,
            min_tokens=question.request.min_tokens,
            skip_special_tokens=question.request.skip_special_tokens,
        )

    def push(self, event: TokenEvent) -> Delta | None:
        """What the event adds; None if there is nothing to show yet. Raises EngineFailed for an error event."""
        if event.finish is FinishReason.ERROR:
            raise EngineFailed(event.error or "The engine could not finish this request.")
        is_first, self._is_first = self._is_first, False
        echoed_tokens = self._echoed_tokens(event.prompt_logprobs) if is_first else []
        new = self._output.push(event.token_ids, finish=event.finish)
        token_ids = event.token_ids[: new.num_tokens]
        offsets = [len(self._echo) + offset for offset in new.text_offsets]
        # strict is off: tokens behind a stop string have log-probabilities too, and the lists end where the text does
        tokens = [ShownToken(*shown) for shown in zip(token_ids, offsets, event.logprobs, strict=False)]
        self.num_tokens += new.num_tokens
        self.num_cached_tokens = event.num_cached_tokens or self.num_cached_tokens
        self.is_finished = new.finish_reason is not None
        text = self._echo + new.text if is_first else new.text
        if not (is_first or text or tokens or self.is_finished or (token_ids and self._request.return_token_ids)):
            return None
        return Delta(
            index=self.index,
            is_first=is_first,
            text=text,
            tokens=echoed_tokens + tokens,
            token_ids=token_ids,
            finish_reason=cast("AnswerFinish | None", new.finish_reason and new.finish_reason.value),
            stop_reason=new.stop_reason,
        )

    def _echoed_tokens(self, prompt_logprobs: list[TokenLogprobs] | None) -> list[ShownToken]:
        """The prompt's tokens, as far as their log-probabilities are asked."""
        if prompt_logprobs is None or self.prompt.echo is None:
            return []
        logprobs = [None, *prompt_logprobs]
        echoed = zip(self.prompt.token_ids, self.prompt.echo.offsets, logprobs, strict=True)
        return [ShownToken(*shown) for shown in echoed]
