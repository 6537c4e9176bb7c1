"""A scheduler with a fake rank behind it, and what every client must hear: each call checks what it sees."""

from collections import deque
from dataclasses import dataclass, field
from itertools import count

import msgspec

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.scheduler import Scheduler
from llmd.engine.sequence import ConnectionId
from llmd.protocol.generation import EngineStatistics, FinishReason, GenerateRequest, TokenEvent
from llmd.protocol.steps import StepPlan, StepResult
from tests.fakes import Completion, FakeRank, expected_completion, token_logprobs

VOCAB_SIZE = 5  # few different tokens, so that stop tokens are often drawn

Key = tuple[ConnectionId, int]


@dataclass
class OpenRequest:
    """A request that has not ended, and what its client has heard."""

    request: GenerateRequest
    events: list[TokenEvent] = field(default_factory=list)

    @property
    def must_be_alone(self) -> bool:
        return self.request.alone and not self.events


class Drive:
    def __init__(
        self, cache: CacheConfig, limits: SchedulerConfig, *, num_blocks: int, max_model_len: int = 1000
    ) -> None:
        self.cache = cache
        self.limits = limits
        self.num_blocks = num_blocks
        self.max_model_len = min(max_model_len, num_blocks * cache.block_size)
        self.scheduler = Scheduler(cache, limits, num_blocks=num_blocks, max_model_len=max_model_len)
        self.rank = FakeRank(cache.block_size, num_blocks=num_blocks, vocab_size=VOCAB_SIZE)
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.open: dict[Key, OpenRequest] = {}
        self.keys: dict[int, Key] = {}  # by sequence id

    @property
    def statistics(self) -> EngineStatistics:
        return self.scheduler.statistics()

    def expected(self, request: GenerateRequest) -> Completion:
        return expected_completion(request, max_model_len=self.max_model_len, vocab_size=VOCAB_SIZE)

    def add(self, request: GenerateRequest, *, connection: int = 0, num_done: int = 0) -> Key:
        """Add the request, as it would be resumed after `num_done` tokens, under the smallest free request id."""
        request_id = next(i for i in count() if (connection, i) not in self.open)
        request = msgspec.structs.replace(request, request_id=request_id)
        key = (ConnectionId(connection), request_id)
        fits = len(request.prompt_token_ids) + min(request.sampling.max_tokens, 1) <= self.max_model_len
        if fits:
            done = self.expected(request).token_ids[:num_done]
            request = msgspec.structs.replace(request, output_token_ids=done)
        event = self.scheduler.add(request, connection=key[0])
        if not fits:
            assert event is not None
            assert event.finish is FinishReason.ERROR
            assert f"maximum context length is {self.max_model_len} tokens" in (event.error or "")
            return key
        self.open[key] = OpenRequest(request)
        is_complete = bool(request.output_token_ids) and not self.expected(request).token_ids
        assert (event is not None) == is_complete
        if event is not None:
            self.hear(key, event)
        return key

    def cancel(self, key: Key) -> None:
        self.open.pop(key, None)
        self.scheduler.cancel(key[1], connection=key[0])
        self.check_blocks()

    def disconnect(self, connection: int) -> None:
        self.open = {key: value for key, value in self.open.items() if key[0] != connection}
        self.scheduler.disconnect(ConnectionId(connection))
        self.check_blocks()

    def plan(self) -> StepPlan | None:
        """Plan a step and have the rank run it; its result waits for `commit`."""
        plan = self.scheduler.plan()
        if plan is None:
            assert self.in_flight or not self.open, f"stuck: {len(self.open)} open requests and nothing to run"
            return None
        assert len(self.in_flight) < self.limits.max_steps_in_flight
        assert 0 < sum(plan.num_tokens) <= self.limits.max_num_batched_tokens
        self._check_started(plan)
        self._check_alone(plan)
        self.in_flight.append((plan, self.rank.execute(plan)))
        assert self.rank.num_sequences <= self.limits.max_num_seqs
        self.check_blocks()
        return plan

    def commit(self) -> dict[Key, TokenEvent]:
        """Commit the oldest step in flight; returns its events."""
        _, result = self.in_flight.popleft()
        heard = {}
        for connection, told in self.scheduler.commit(result).items():
            for event in told.all_events():
                key = (connection, event.request_id)
                self.hear(key, event)
                heard[key] = event
        self.check_blocks()
        return heard

    def step(self) -> None:
        """Work as the loop does: plan as far ahead as allowed, then commit one step."""
        while self.plan() is not None:
            pass
        if self.in_flight:
            self.commit()

    def finish(self) -> None:
        """Left alone, every request ends, every block comes home and nothing is left to do."""
        while self.open or self.in_flight:
            self.step()
        assert self.scheduler.plan() is None
        assert self.scheduler.is_idle
        assert (self.statistics.num_running, self.statistics.num_waiting) == (0, 0)
        assert self.statistics.num_steps == self.rank.num_steps
        self.check_blocks()

    def check_blocks(self) -> None:
        """Each block is home or held, and all are home if nobody is left to hold them, whatever is in flight."""
        self.scheduler.check()
        if not self.open:
            assert self.statistics.num_free_blocks == self.num_blocks

    def hear(self, key: Key, event: TokenEvent) -> None:
        """What a client hears must be a piece of the one right answer."""
        assert key in self.open, f"an event for a request that has ended: {event}"
        heard, request = self.open[key].events, self.open[key].request
        self._check_first_event(request, event, is_first=not heard)
        expected = self.expected(request)
        before = [token_id for earlier in heard for token_id in earlier.token_ids]
        token_ids = before + event.token_ids
        assert token_ids == expected.token_ids[: len(token_ids)]
        logprobs = []
        if request.sampling.num_logprobs is not None:
            context = [*request.prompt_token_ids, *request.output_token_ids, *before]
            logprobs = [token_logprobs(context, token_id) for token_id in event.token_ids]
        assert event.logprobs == logprobs
        assert event.token_ids or event.finish
        assert event.finish is (expected.finish if token_ids == expected.token_ids else None)
        heard.append(event)
        if event.finish is not None:
            del self.open[key]

    def _check_started(self, plan: StepPlan) -> None:
        """Who begins to run is told, and is open."""
        for new, key in zip(plan.new, self.scheduler.started(plan), strict=True):
            request = self.open[key].request
            assert new.token_ids[: new.num_prompt_tokens] == request.prompt_token_ids
            self.keys[new.sequence_id] = key

    def _check_alone(self, plan: StepPlan) -> None:
        """While there is a sequence that must be alone, such a one runs, and nobody else in any step in flight."""
        alone = {key for key, opened in self.open.items() if opened.must_be_alone}
        if not alone:
            return
        now, *in_flight = [
            {self.keys[sequence_id] for sequence_id in each.sequence_ids}
            for each in (plan, *(earlier for earlier, _ in self.in_flight))
        ]
        assert len(now) == 1
        assert now <= alone
        assert all(keys == now for keys in in_flight)

    def _check_first_event(self, request: GenerateRequest, event: TokenEvent, *, is_first: bool) -> None:
        prompt = request.prompt_token_ids
        has_run = bool(event.token_ids) or not request.output_token_ids
        if is_first and has_run and request.sampling.num_prompt_logprobs is not None:
            assert event.prompt_logprobs == [token_logprobs(prompt[:i], prompt[i]) for i in range(1, len(prompt))]
            assert event.num_cached_tokens == 0
        else:
            assert event.prompt_logprobs is None
        if is_first:
            assert event.num_cached_tokens is not None
            assert event.num_cached_tokens <= len(prompt)
            assert event.num_cached_tokens < len(prompt) + len(request.output_token_ids)
            assert self.cache.prefix_caching or event.num_cached_tokens == 0
        else:
            assert event.num_cached_tokens is None
