"""Decides what each step runs. Pure: no clock, no I/O, no tensors.

A sequence has no prefill phase and no decode phase: it has a number of tokens to catch up with, and a step has a token
budget. Chunked prefill, prefix hits, preemption and resume (contract C1) are all the same thing.

`plan` may be called again before the result of the last plan is known: by the time the ranks run the next step they
know the token that the last one drew. Results come to `commit` in the order of the plans.
"""

from bisect import bisect_left, insort
from collections import deque
from dataclasses import asdict
from itertools import count, islice
from operator import attrgetter

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.block_pool import BlockPool
from llmd.engine.counters import Counters
from llmd.engine.fair_rounds import FairRounds
from llmd.engine.prefix_cache import PrefixCache, extend_block_hashes
from llmd.engine.sequence import ConnectionId, Sequence
from llmd.errors import LlmdError
from llmd.protocol.generation import EngineStatistics, FinishReason, GenerateRequest, TokenEvent
from llmd.protocol.steps import NewSequence, SequenceStep, StepPlan, StepResult

_order = attrgetter("order")


def _is_prompt(share: tuple[int, Sequence]) -> bool:
    """Whether it has more than one token to run."""
    return share[0] > 1


class RequestAlreadyOpen(LlmdError):
    """A server used a request id again before the first request of that id had ended."""


class Scheduler:
    """All open requests of an engine, and the blocks that their sequences hold."""

    def __init__(self, cache: CacheConfig, limits: SchedulerConfig, *, num_blocks: int, max_model_len: int) -> None:
        self._block_size = cache.block_size
        self._prefix_caching = cache.prefix_caching
        self._limits = limits
        # a sequence alone must fit, or the oldest one could wait for blocks for ever
        self.max_model_len = min(max_model_len, num_blocks * cache.block_size)
        self._prefix_cache = PrefixCache()
        self._blocks = BlockPool(num_blocks, self._prefix_cache)

        self._open: dict[tuple[ConnectionId, int], Sequence] = {}  # by (connection, request id)
        self._waiting: list[Sequence] = []  # in order
        self._rounds = FairRounds()
        self._running: dict[int, Sequence] = {}  # by sequence id
        self._dropped: list[int] = []  # sequence ids that the ranks must still be told to forget
        self._in_flight: deque[StepPlan] = deque()
        self._arrivals = count()
        self._sequence_ids = count()
        self._step_ids = count()

        self._counters = Counters()

    @property
    def num_in_flight(self) -> int:
        """Plans that are not committed yet."""
        return len(self._in_flight)

    @property
    def is_idle(self) -> bool:
        """No request is open and no plan is in flight."""
        return not self._open and not self._in_flight

    def add(self, request: GenerateRequest, *, connection: ConnectionId) -> TokenEvent | None:
        """Take in a request. Returns its only event if it ends at once: refused, or resumed when it was complete.

        Raises RequestAlreadyOpen if the connection has an open request of this id.
        """
        key = (connection, request.request_id)
        if key in self._open:
            raise RequestAlreadyOpen(f"request {request.request_id} is already open on this connection")
        if error := self._refusal(request):
            return TokenEvent(request_id=request.request_id, finish=FinishReason.ERROR, error=error)
        num_prompt_tokens = len(request.prompt_token_ids)
        sequence = Sequence(
            connection=connection,
            request=request,
            token_ids=[*request.prompt_token_ids, *request.output_token_ids],
            num_prompt_tokens=num_prompt_tokens,
            max_output_tokens=min(request.sampling.max_tokens, self.max_model_len - num_prompt_tokens),
            must_be_alone=request.alone,
        )
        if finish := sequence.finish_reason():
            return TokenEvent(request_id=request.request_id, num_cached_tokens=0, finish=finish)
        priority = request.priority if self._limits.policy == "priority" else 0
        fair_round = self._rounds.join(request.client, priority=priority)
        sequence.order = (not request.alone, priority, fair_round, next(self._arrivals))
        self._open[key] = sequence
        insort(self._waiting, sequence, key=_order)
        return None

    def cancel(self, request_id: int, *, connection: ConnectionId) -> None:
        """Forget a request and take its blocks back. There is no event; none if it has ended already, either."""
        if sequence := self._open.get((connection, request_id)):
            self._close(sequence)

    def disconnect(self, connection: ConnectionId) -> None:
        """Cancel all requests of a connection."""
        for sequence in [sequence for sequence in self._open.values() if sequence.connection == connection]:
            self._close(sequence)

    def plan(self) -> StepPlan | None:
        """The next step; None if there is nothing to run, or the steps in flight must come back first."""
        if len(self._in_flight) >= self._limits.max_steps_in_flight:
            return None
        if not self._make_way():
            return None
        num_preemptions = self._counters.num_preemptions
        shares = self._share_out()
        new: list[NewSequence] = []
        # blocks that a preemption has just freed are for those that run
        if self._counters.num_preemptions == num_preemptions:
            new = self._admit(shares)
        if not shares:
            return None
        plan = self._plan_rows(shares, new)
        self._dropped = []
        self._in_flight.append(plan)
        return plan

    def started(self, plan: StepPlan) -> list[tuple[ConnectionId, int]]:
        """(connection, request id) of each of `plan.new`. To be asked before anything else happens to them."""
        sequences = [self._running[new.sequence_id] for new in plan.new]
        return [(sequence.connection, sequence.request.request_id) for sequence in sequences]

    def commit(self, result: StepResult) -> dict[ConnectionId, list[TokenEvent]]:
        """Take in what the oldest plan in flight produced; returns what each connection must hear.

        Raises ValueError if the result is not that plan's.
        """
        plan = self._in_flight.popleft()
        if result.step_id != plan.step_id:
            raise ValueError(f"expected the result of step {plan.step_id}, not of step {result.step_id}")
        if len(result.token_ids) != sum(plan.samples):
            raise ValueError(f"step {plan.step_id} drew {len(result.token_ids)} tokens, not {sum(plan.samples)}")
        self._counters.count_step(sum(plan.num_tokens))
        token_ids = iter(result.token_ids)
        events: dict[ConnectionId, list[TokenEvent]] = {}
        for step in plan.rows():
            token_id = next(token_ids) if step.samples else None
            # without a sequence of this id it has meanwhile finished, been cancelled or been preempted
            if sequence := self._running.get(step.sequence_id):
                event = self._commit_sequence(sequence, step, token_id, result)
                if event is not None:
                    events.setdefault(sequence.connection, []).append(event)
        return events

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks=self._blocks.num_blocks,
            num_free_blocks=self._blocks.num_free,
            **asdict(self._counters),
        )

    def check(self) -> None:
        """Prove that each block is free or held by running sequences (contract C4). Raises RuntimeError: a bug."""
        self._blocks.check(sequence.block_ids for sequence in self._running.values())

    def _refusal(self, request: GenerateRequest) -> str | None:
        """Why the request can never run, if so."""
        num_prompt_tokens = len(request.prompt_token_ids)
        if num_prompt_tokens == 0:
            return "The prompt has no tokens; it needs at least one."
        if num_prompt_tokens + min(request.sampling.max_tokens, 1) > self.max_model_len:
            return (
                f"This model's maximum context length is {self.max_model_len} tokens, but the prompt has "
                f"{num_prompt_tokens}, which leaves no room for an answer. Shorten the prompt."
            )
        return None

    def _make_way(self) -> bool:
        """If the next to begin must be alone, have nobody else run. False while others have steps in flight."""
        if self._is_taken() or not (self._waiting and self._waiting[0].must_be_alone):
            return True
        if self._in_flight:
            return False
        for sequence in list(self._running.values()):
            self._preempt(sequence)
        return True

    def _is_taken(self) -> bool:
        """Whether a sequence runs that must be alone. Then it is the only one."""
        return any(sequence.must_be_alone for sequence in islice(self._running.values(), 1))

    def _share_out(self) -> dict[Sequence, int]:
        """How many tokens each running sequence gets in this step, with the blocks for them.

        Those with one token to run come first, so that a long prompt does not hold them up; both kinds in order. Only
        they can lack a block: the others have had theirs since they were admitted. Then the last in order is preempted,
        and so it never has a share yet; the last one itself waits, keeping what it has. The first always gets on.
        """
        shares: dict[Sequence, int] = {}
        budget = self._limits.max_num_batched_tokens
        in_order = sorted(self._running.values(), key=_order)
        to_run = [(n, sequence) for sequence in in_order if (n := sequence.num_to_run) > 0]
        to_run.sort(key=_is_prompt)
        for num_to_run, sequence in to_run:
            if sequence.sequence_id is None:  # preempted just now, below
                continue
            num_tokens = num_to_run if num_to_run < budget else budget
            while num_tokens > 0 and not self._grow(sequence, num_tokens):
                victim = max(self._running.values(), key=_order)
                if victim is sequence:
                    num_tokens = 0
                else:
                    self._preempt(victim)
            if num_tokens > 0:
                shares[sequence] = num_tokens
                budget -= num_tokens
        return shares

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Take the blocks that `num_tokens` more need; False if there are not enough."""
        num_after = sequence.num_planned + num_tokens
        if num_after <= len(sequence.block_ids) * self._block_size:
            return True
        taken = self._blocks.take(self._num_blocks(num_after) - len(sequence.block_ids))
        if taken is None:
            return False
        sequence.block_ids += taken
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue: its tokens are computed anew when there is room, those that the cache lost meanwhile."""
        self._stop_running(sequence)
        insort(self._waiting, sequence, key=_order)
        self._counters.num_preemptions += 1

    def _admit(self, shares: dict[Sequence, int]) -> list[NewSequence]:
        """Let waiting sequences run with what is left of the budget, in order; adds to `shares`."""
        new: list[NewSequence] = []
        budget = self._limits.max_num_batched_tokens - sum(shares.values())
        position = 0
        while budget > 0 and position < len(self._waiting) and len(self._running) < self._limits.max_num_seqs:
            if self._is_taken():
                break
            sequence = self._waiting[position]
            cached_ids, is_expected = self._look_up(sequence)
            if is_expected:
                position += 1
                continue
            # blocks for all that is known, so that a prompt once begun is never stuck half way
            num_taken = self._num_blocks(sequence.num_known) - len(cached_ids)
            taken_ids = self._blocks.take(num_taken, sharing=cached_ids)
            if taken_ids is None:
                break
            del self._waiting[position]
            new.append(self._start(sequence, cached_ids, taken_ids))
            shares[sequence] = min(budget, sequence.num_to_run)
            budget -= shares[sequence]
        return new

    def _look_up(self, sequence: Sequence) -> tuple[list[int], bool]:
        """The cached blocks of its prefix, and whether a running sequence is computing the block after them.

        At least the last token is left to compute, because its logits are needed.
        """
        if not self._prefix_caching:
            return [], False
        self._extend_block_hashes(sequence)
        if sequence.wants_prompt_logprobs:
            return [], False
        num_usable = (sequence.num_known - 1) // self._block_size
        cached_ids = self._prefix_cache.find(islice(sequence.block_hashes, num_usable))
        num_cached = len(cached_ids)
        is_expected = num_cached < num_usable and self._prefix_cache.is_expected(sequence.block_hashes[num_cached])
        return cached_ids, is_expected

    def _start(self, sequence: Sequence, cached_ids: list[int], taken_ids: list[int]) -> NewSequence:
        """From waiting to running, under a new sequence id: results of an earlier admission are not this one's."""
        sequence_id = next(self._sequence_ids)
        num_cached_tokens = len(cached_ids) * self._block_size
        sequence.start(sequence_id, cached_ids=cached_ids, taken_ids=taken_ids, num_cached_tokens=num_cached_tokens)
        self._running[sequence_id] = sequence
        _, priority, fair_round, _ = sequence.order
        self._rounds.begin(sequence.request.client, priority=priority, joined=fair_round)
        self._prefix_cache.expect(islice(sequence.block_hashes, len(cached_ids), None), sequence_id=sequence_id)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(num_cached_tokens, sequence.num_prompt_tokens)
            if self._prefix_caching and not sequence.wants_prompt_logprobs:
                self._counters.prefix_cache_queries += sequence.num_known
                self._counters.prefix_cache_hits += num_cached_tokens
        return sequence.to_new_sequence(sequence_id)

    def _plan_rows(self, shares: dict[Sequence, int], new: list[NewSequence]) -> StepPlan:
        """A step of these shares."""
        sequence_ids: list[int] = []
        starts: list[int] = []
        all_samples: list[bool] = []
        new_block_ids: dict[int, list[int]] = {}
        for sequence, num_tokens in shares.items():
            assert sequence.sequence_id is not None
            start = sequence.num_planned
            samples = start + num_tokens == sequence.num_total and sequence.max_output_tokens > 0
            if sequence.num_blocks_sent < len(sequence.block_ids):
                new_block_ids[sequence.sequence_id] = sequence.block_ids[sequence.num_blocks_sent :]
                sequence.num_blocks_sent = len(sequence.block_ids)
            sequence.num_planned = start + num_tokens
            sequence.num_samples_in_flight += samples
            sequence_ids.append(sequence.sequence_id)
            starts.append(start)
            all_samples.append(samples)
        return StepPlan(
            step_id=next(self._step_ids),
            dropped=self._dropped,
            new=new,
            new_block_ids=new_block_ids,
            sequence_ids=sequence_ids,
            starts=starts,
            num_tokens=list(shares.values()),
            samples=all_samples,
        )

    def _commit_sequence(
        self, sequence: Sequence, step: SequenceStep, token_id: int | None, result: StepResult
    ) -> TokenEvent | None:
        """Take in one sequence's part of a step; returns what its client must hear, if anything."""
        end = step.start + step.num_tokens
        sequence.num_computed = end
        if step.start < sequence.num_prompt_tokens:
            self._counters.num_prompt_tokens += min(end, sequence.num_prompt_tokens) - step.start
        sequence.prompt_logprobs += result.prompt_logprobs.get(step.sequence_id, ())
        token_ids = []
        if token_id is not None:
            token_ids.append(token_id)
            sequence.token_ids.append(token_id)
            sequence.num_samples_in_flight -= 1
            self._counters.num_output_tokens += 1
            if sequence.must_be_alone:
                self._clear(sequence)
        if self._prefix_caching and end >= (sequence.num_blocks_published + 1) * self._block_size:
            self._publish(sequence)
        finish = sequence.finish_reason()
        if not token_ids and finish is None:
            return None
        logprobs = [result.logprobs[step.sequence_id]] if step.sequence_id in result.logprobs else []
        request_id = sequence.request.request_id
        if sequence.has_reported:
            event = TokenEvent(request_id=request_id, token_ids=token_ids, logprobs=logprobs, finish=finish)
        else:
            event = TokenEvent(
                request_id=request_id,
                token_ids=token_ids,
                logprobs=logprobs,
                prompt_logprobs=sequence.prompt_logprobs if sequence.wants_prompt_logprobs else None,
                num_cached_tokens=sequence.num_cached_tokens,
                finish=finish,
            )
            sequence.has_reported = True
        if finish is not None:
            self._close(sequence)
        return event

    def _clear(self, sequence: Sequence) -> None:
        """It has drawn a token and nothing broke: from now on it is one of many."""
        sequence.must_be_alone = False
        sequence.order = (True, *sequence.order[1:])

    def _publish(self, sequence: Sequence) -> None:
        """Offer the full blocks that were completed to others."""
        num_full = sequence.num_computed // self._block_size
        self._extend_block_hashes(sequence)
        for index in range(sequence.num_blocks_published, num_full):
            self._prefix_cache.publish(sequence.block_hashes[index], sequence.block_ids[index])
        sequence.num_blocks_published = num_full

    def _extend_block_hashes(self, sequence: Sequence) -> None:
        """Hash the full blocks of known tokens that have no hash yet."""
        extend_block_hashes(
            sequence.block_hashes,
            sequence.token_ids,
            block_size=self._block_size,
            cache_salt=sequence.request.cache_salt,
        )

    def _close(self, sequence: Sequence) -> None:
        """The request has ended: nothing of it is left but the word to the ranks."""
        del self._open[sequence.connection, sequence.request.request_id]
        if sequence.sequence_id is None:
            del self._waiting[bisect_left(self._waiting, sequence.order, key=_order)]
        else:
            self._stop_running(sequence)
        _, priority, fair_round, _ = sequence.order
        self._rounds.end(sequence.request.client, priority=priority, joined=fair_round)

    def _stop_running(self, sequence: Sequence) -> None:
        assert sequence.sequence_id is not None
        del self._running[sequence.sequence_id]
        self._dropped.append(sequence.sequence_id)
        self._prefix_cache.expect_no_longer(
            sequence.block_hashes, start=sequence.num_blocks_published, sequence_id=sequence.sequence_id
        )
        self._blocks.give_back(sequence.stop())

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
