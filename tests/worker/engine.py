"""The real scheduler and a real runner in one process, with as many plans between them as the scheduler allows."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from llmd.engine.scheduler import Scheduler
from llmd.engine.sequence import ConnectionId
from llmd.protocol.generation import GenerateRequest, SamplingParams, TokenLogprobs
from llmd.worker.runner import PendingStep, Runner

CONNECTION = ConnectionId(0)
BLOCK_SIZE = 16


@dataclass
class Answer:
    """What a client would have heard."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int | None = None


@dataclass
class Engine:
    scheduler: Scheduler
    runner: Runner

    def run(self, requests: Iterable[GenerateRequest]) -> dict[int, Answer]:
        """All requests to their end."""
        answers: dict[int, Answer] = {}
        for request in requests:
            answers[request.request_id] = Answer()
            assert self.scheduler.add(request, connection=CONNECTION) is None
        launched: deque[PendingStep] = deque()
        while not self.scheduler.is_idle:
            while plan := self.scheduler.plan():
                launched.append(self.runner.launch(plan))
            told = self.scheduler.commit(launched.popleft().result())
            for event in told[CONNECTION].all_events() if CONNECTION in told else ():
                answer = answers[event.request_id]
                answer.token_ids += event.token_ids
                answer.logprobs += event.logprobs
                if event.prompt_logprobs is not None:
                    answer.prompt_logprobs = event.prompt_logprobs
                if event.num_cached_tokens is not None:
                    answer.num_cached_tokens = event.num_cached_tokens
        self.scheduler.check()
        return answers


def generate_request(
    request_id: int, prompt: list[int], *, seed: int = 0, output_token_ids: list[int] | None = None, **parameters: Any
) -> GenerateRequest:
    """A request with any of the sampling parameters."""
    sampling = SamplingParams(seed=seed, **parameters)
    return GenerateRequest(
        request_id=request_id, prompt_token_ids=prompt, sampling=sampling, output_token_ids=output_token_ids or []
    )
