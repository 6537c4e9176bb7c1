"""Those who want answers. Every answer that comes is compared with the one that the undisturbed server gave."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from random import Random
from time import perf_counter

import httpx

from soaking.asking import Answer, Broken, Connection, Refused, ask
from soaking.questions import Body, Question, in_some_manner, streamed
from soaking.report import Report

# an answer that takes so long will not come any more
READ_TIMEOUT = 600.0  # seconds
# a refusal may name a longer time; then the load would be gone for as long
MAX_RETRY_WAIT = 3.0  # seconds

_LEARNING_AT_ONCE = 4

# shares of all requests
_WITH_A_DEADLINE = 0.06
_LEAVING = 0.08


class Clients:
    """They share their knowledge of the right answers, and of what the chaos has done to them."""

    def __init__(
        self,
        url: str,
        report: Report,
        *,
        output: Path,
        on_token: Callable[[], None] = lambda: None,
    ) -> None:
        self.questions: list[Question] = []
        self._report = report
        self._output = output
        self._on_token = on_token
        self._references: dict[str, Answer] = {}
        self._is_over = False
        # local ports of connections whose server process was killed, and when
        self._cut_at: dict[int, float] = {}
        self.http = httpx.AsyncClient(
            base_url=f"{url}/v1",
            timeout=httpx.Timeout(30, read=READ_TIMEOUT),
            # a connection a request: so it is known which process each of them belongs to
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            # the certificate of a server under test is its own
            verify=False,
        )

    async def learn(self) -> None:
        """Ask every question once, in one piece and in little company: what all later answers must be."""
        self._report.num_questions = len(self.questions)
        turns = asyncio.Semaphore(_LEARNING_AT_ONCE)

        async def learn_one(question: Question) -> None:
            async with turns:
                self._references[question.name] = await ask(self.http, question.path, question.body)

        await asyncio.gather(*map(learn_one, self.questions))

    def finish(self) -> None:
        """Ask nothing new, and do not insist where the server refuses."""
        self._is_over = True

    def note_cut(self, ports: set[int]) -> None:
        """The server process behind these connections is about to be killed."""
        self._cut_at |= dict.fromkeys(ports, perf_counter())

    async def keep_asking(self, random: Random) -> None:
        """One client, one request after the other, until `finish`."""
        while not self._is_over:
            question = random.choice(self.questions)
            body = in_some_manner(question.body, random)
            leaves_after = None
            if random.random() < _WITH_A_DEADLINE:
                body["timeout"] = random.uniform(0.05, 3)
            elif random.random() < _LEAVING:
                leaves_after = random.uniform(0, 3)
            await self.insist(question, body, leaves_after=leaves_after)

    async def overload(self, random: Random, num_requests: int) -> None:
        """Many requests with many choices at once; whoever is refused comes again."""
        wide = [question for question in self.questions if question.num_choices >= 3]
        asked = [random.choice(wide) for _ in range(num_requests)]
        await asyncio.gather(*(self.insist(each, in_some_manner(each.body, random)) for each in asked))

    async def insist(self, question: Question, body: Body, *, leaves_after: float | None = None) -> None:
        """Ask until there is an answer, and compare it."""
        self._report.num_requests += 1
        while True:
            connection = Connection()
            started = perf_counter()
            try:
                async with asyncio.timeout(leaves_after):
                    answer = await ask(
                        self.http, question.path, body, connection=connection, on_event=lambda _: self._on_token()
                    )
            except TimeoutError:
                self._report.num_left += 1
                return
            except Refused as refusal:
                wait = self._note_refusal(refusal, question, body)
                if wait is None:
                    return
                await asyncio.sleep(wait)
                continue
            except (Broken, httpx.TransportError, ValueError, KeyError) as error:
                if self._cut_at.get(connection.local_port, -1.0) > started:
                    self._report.num_cut += 1
                else:
                    self._report.lost.append(f"{question.name}: {error!r}")
                return
            self._report.longest_pause = max(self._report.longest_pause, connection.longest_pause)
            self._compare(question, body, answer)
            return

    def _note_refusal(self, refusal: Refused, question: Question, body: Body) -> float | None:
        """Seconds to wait before asking again; None if there is nothing more to ask."""
        report = self._report
        report.refusals[refusal.status] += 1
        if refusal.status == 408 and "timeout" in body:
            report.num_deadlines += 1
            return None
        if refusal.status not in (429, 503):
            report.lost.append(f"{question.name}: {refusal}")
            return None
        if refusal.retry_after is None:
            report.num_without_retry_after += 1
        if self._is_over:
            report.num_never_admitted += 1
            return None
        return min(refusal.retry_after or 1.0, MAX_RETRY_WAIT)

    async def drained_wave(self, num_requests: int, terminate: Callable[[], None]) -> None:
        """So many streams at once; `terminate` is called when all of them have begun."""
        single = [question for question in self.questions if question.num_choices == 1]
        connections = [Connection() for _ in range(num_requests)]
        tasks = [
            asyncio.create_task(self._ask_once(single[-1 - number % len(single)], connection))
            for number, connection in enumerate(connections)
        ]
        while not all(c.began or t.done() for c, t in zip(connections, tasks, strict=True)):
            await asyncio.sleep(0.01)
        terminate()
        await asyncio.gather(*tasks)

    async def _ask_once(self, question: Question, connection: Connection) -> None:
        self._report.num_requests += 1
        body = streamed(question.body)
        try:
            answer = await ask(self.http, question.path, body, connection=connection)
        except (Refused, Broken, httpx.TransportError, ValueError, KeyError) as error:
            self._report.lost.append(f"{question.name}, while it drained: {error!r}")
            return
        self._report.num_drained += 1
        self._compare(question, body, answer)

    def _compare(self, question: Question, body: Body, answer: Answer) -> None:
        reference = self._references[question.name]
        if answer == reference:
            self._report.num_compared += 1
        elif "timeout" in body and _is_beginning(answer, reference):
            self._report.num_deadlines += 1
        else:
            path = self._output / f"different-{len(self._report.different)}.json"
            record = {"path": question.path, "body": body, "expected": asdict(reference), "got": asdict(answer)}
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False))
            self._report.different.append(f"{question.name}: see {path}")


def _is_beginning(answer: Answer, reference: Answer) -> bool:
    """Whether every choice is the beginning of what it should have been."""
    return answer.choices.keys() == reference.choices.keys() and all(
        choice == reference.choices[index]
        or (
            choice["finish_reason"] == "length"
            and _starts_with(reference.choices[index]["token_ids"], choice["token_ids"])
            and _starts_with(reference.choices[index]["logprobs"], choice["logprobs"])
        )
        for index, choice in answer.choices.items()
    )


def _starts_with(whole: list[object], beginning: list[object]) -> bool:
    return whole[: len(beginning)] == beginning
