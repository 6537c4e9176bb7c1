"""One request being answered: events of the engine in, deltas that may be shown out.

Streamed and whole answers are made of the same deltas (contract C6): a whole answer is the sum of them. It must not
know how a chat or a completion looks; `chat` and `completions` render their own.
"""

import math
from types import TracebackType
from typing import Self

import trio

from llmd.errors import DeadlineExceeded
from llmd.protocol.generation import FinishReason, TokenEvent
from llmd.server.admission import overloaded, rejection
from llmd.server.choice import Choice, Delta, summed
from llmd.server.connection import hold
from llmd.server.context import Server
from llmd.server.engine_client import IndexedEvent
from llmd.server.metrics import SequenceTimes
from llmd.server.openai_responses import PromptTokensDetails, Usage
from llmd.server.question import Question
from llmd.server.request_record import note_answer


def begin(server: Server, question: Question) -> "Answer":
    """Have the engine answer, until the current HTTP request ends at the latest. Raises Overloaded.

    Between the check and the submission nothing else runs: the bound is never passed by many that come at once.
    """
    limits = server.config.http
    backlog = server.engine.backlog
    client = question.client if limits.asks_for_keys else None
    reason = rejection(
        backlog,
        num_sequences=question.num_choices,
        num_tokens=question.request.n * question.num_prompt_tokens,
        max_num_sequences=limits.max_num_queued_reqs,
        max_num_tokens=limits.max_num_queued_tokens,
        client=client,
    )
    if reason is not None:
        server.metrics.rejected(reason)
        limit = limits.max_num_queued_reqs if reason == "queued_reqs" else limits.max_num_queued_tokens
        raise overloaded(backlog, reason, limit=limit, now=trio.current_time(), client=client)
    answer = Answer(server, question)
    hold(answer)
    note_answer(question, answer)
    return answer


async def collect(answer: "Answer") -> tuple[list[Delta], Usage]:
    """The whole answer: each choice as one delta, in order of index. Raises EngineFailed or DeadlineExceeded."""
    parts: list[list[Delta]] = [[] for _ in range(answer.num_choices)]
    with answer:
        while not answer.is_over:
            for delta in await answer.deltas():
                parts[delta.index].append(delta)
        return [summed(deltas) for deltas in parts], answer.usage()


class Answer:
    """The choices of one request while they grow. Ask for `deltas` until `is_over`; then `usage` is final.

    Generation begins at once. Use it as a block: however that is left, what has not ended is cancelled and counted.
    Leaving it again does nothing.
    """

    def __init__(self, server: Server, question: Question) -> None:
        self._metrics = server.metrics
        self._question = question
        text = server.loaded_text()
        self._choices = [Choice(text, question, index) for index in range(question.num_choices)]
        self._num_open = question.num_choices
        # choices that have not ended, by prompt
        self._num_unfinished = [question.request.n] * len(question.prompts)
        self._submitted = trio.current_time()
        self._generation = server.engine.generate(question.starts())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._generation.cancel_all()
        # the client left, or ran out of patience
        aborted = isinstance(error, DeadlineExceeded) or not isinstance(error, Exception)
        for choice in self._choices:
            if not choice.is_finished:
                self._finish(choice, "abort" if aborted else "error")

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def finish_reasons(self) -> list[str]:
        """How the choices have ended, in order of index; also "abort" and "error". Not of those that are open."""
        return [choice.ended_by for choice in self._choices if choice.ended_by is not None]

    @property
    def started_at(self) -> float | None:
        """When an engine first began to run any choice, on trio's clock; None while it has not."""
        times = [self._generation.started_at(choice.index) for choice in self._choices]
        return min([time for time in times if time is not None], default=None)

    @property
    def first_token_seconds(self) -> float | None:
        """From the request's arrival to the first token of any choice; None if none came."""
        times = [choice.first_token_seconds for choice in self._choices if choice.first_token_seconds is not None]
        return min(times, default=None)

    @property
    def is_over(self) -> bool:
        return self._num_open == 0

    async def deltas(self, *, until: float = math.inf) -> list[Delta]:
        """What is new since the last call, of all choices, in order of arrival; waits for the first.

        Perhaps nothing: if there is nothing to show yet, or none came `until` then (on trio's clock).
        When the request's deadline passes, every choice ends with what it has. Raises DeadlineExceeded if none has
        anything, EngineFailed if one of the choices cannot be finished.
        """
        deadline = self._question.deadline
        with trio.CancelScope(deadline=min(deadline, until)):
            return self._take_in(await self._generation.take())
        return self._end_early() if trio.current_time() >= deadline else []

    def _end_early(self) -> list[Delta]:
        """The deadline has passed: nothing more is computed, and every choice ends with the tokens it has."""
        self._generation.cancel_all()
        deltas = self._take_in(self._generation.take_pending())
        if not any(choice.num_tokens or choice.is_finished for choice in self._choices):
            seconds = self._question.deadline - self._question.arrived
            raise DeadlineExceeded(
                f"The request's timeout of {seconds:g} seconds passed before its first token. Allow more time, or try "
                "again when the server has less to do."
            )
        ending = TokenEvent(request_id=-1, finish=FinishReason.LENGTH)
        for choice in self._choices:
            if not choice.is_finished and (delta := choice.push(ending)) is not None:
                deltas.append(delta)
                self._num_open -= 1
                self._finish(choice, FinishReason.LENGTH)
        return deltas

    def _take_in(self, events: list[IndexedEvent]) -> list[Delta]:
        deltas: list[Delta] = []
        self._metrics.output_tokens(sum([len(event.token_ids) for _, event in events]))
        for index, event in events:
            choice = self._choices[index]
            if choice.is_finished:
                continue  # a stop string ended it, and the engine had not heard yet
            self._observe(choice, event)
            delta = choice.push(event)
            if delta is None:
                continue
            deltas.append(delta)
            if delta.finish_reason is not None:
                self._num_open -= 1
                self._generation.cancel(index)
                self._finish(choice, delta.finish_reason)
        return deltas

    def usage(self) -> Usage:
        """Tokens of the whole request so far."""
        prompt_tokens = self._question.num_prompt_tokens
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        # the further choices of a prompt find in the cache what the first has put there: that saved the client nothing
        cached_tokens = sum(choice.num_cached_tokens for choice in self._choices[:: self._question.request.n])
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens),
        )

    def _observe(self, choice: Choice, event: TokenEvent) -> None:
        now = trio.current_time()
        if choice.last_event_at is None:
            if event.finish is FinishReason.ERROR:
                return  # it ends without having begun
            choice.first_token_seconds = now - self._question.arrived
            self._metrics.first_token(choice.first_token_seconds)
            self._metrics.began(prompt_tokens=len(choice.prompt.token_ids), cached_tokens=event.num_cached_tokens or 0)
        else:
            self._metrics.inter_token(now - choice.last_event_at)
        choice.last_event_at = now

    def _finish(self, choice: Choice, reason: str) -> None:
        choice.is_finished = True
        choice.ended_by = reason
        arrived, started_at = self._question.arrived, self._generation.started_at(choice.index)
        times = SequenceTimes(
            submitted=self._submitted - arrived,
            started=None if started_at is None else started_at - arrived,
            first_token=choice.first_token_seconds,
            ended=trio.current_time() - arrived,
        )
        self._metrics.finished(
            reason,
            times,
            prompt_tokens=len(choice.prompt.token_ids),
            cached_tokens=choice.num_cached_tokens,
            output_tokens=choice.num_tokens,
            max_tokens=choice.sampling.max_tokens,
        )
        self._note_finished(choice.index // self._question.request.n)

    def _note_finished(self, prompt_index: int) -> None:
        """One more choice of this prompt has ended."""
        self._num_unfinished[prompt_index] -= 1
        if self._num_unfinished[prompt_index] == 0:
            n = self._question.request.n
            siblings = self._choices[prompt_index * n : (prompt_index + 1) * n]
            self._metrics.prompt_finished(n=n, max_output_tokens=max([choice.num_tokens for choice in siblings]))
