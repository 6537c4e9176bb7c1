"""Decides what each step runs. Pure: no clock, no I/O, no tensors.

A sequence has no prefill phase and no decode phase: it has a number of tokens to catch up with, and a step has a token
budget. Chunked prefill, prefix hits, preemption and resume (contract C1) are all the same thing.

`plan` may be called again before the result of the last plan is known: by the time the ranks run the next step they
know the token that the last one drew. Results come to `commit` in the order of the plans.
"""

from bisect import bisect_left, insort
from collections import defaultdict, deque
from dataclasses import asdict
from itertools import count, islice
from operator import attrgetter

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.block_pool import BlockPool
from llmd.engine.counters import Counters
from llmd.engine.fair_rounds import FairRounds
from llmd.engine.prefix_cache import PrefixCache, extend_block_hashes
from llmd.engine.rows import PlannedStep, Rows
from llmd.engine.sequence import ConnectionId, Sequence
from llmd.errors import LlmdError
from llmd.protocol.generation import (
    EngineStatistics,
    FinishReason,
    GenerateRequest,
    StepEvents,
    TokenEvent,
    TokenLogprobs,
)
from llmd.protocol.steps import NewSequence, StepPlan, StepResult

_order = attrgetter("order")


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
        self._running: list[Sequence] = []  # in order
        self._dropped: list[int] = []  # sequence ids that the ranks must still be told to forget
        self._in_flight: deque[PlannedStep] = deque()
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
        rows = self._share_out()
        # blocks that a preemption has just freed are for those that run
        new = self._admit(rows) if self._counters.num_preemptions == num_preemptions else []
        if not rows.sequences:
            return None
        step = rows.to_step(next(self._step_ids), dropped=self._dropped, new=new)
        self._dropped = []
        self._in_flight.append(step)
        return step.plan

    def started(self, plan: StepPlan) -> list[tuple[ConnectionId, int]]:
        """(connection, request id) of each of `plan.new`, in the plan that was made last."""
        sequences = self._in_flight[-1].sequences
        # they are its last rows
        new = islice(sequences, len(sequences) - len(plan.new), None)
        return [(sequence.connection, sequence.request_id) for sequence in new]

    def commit(self, result: StepResult) -> dict[ConnectionId, StepEvents]:
        """Take in what the oldest plan in flight produced; returns what each connection must hear.

        Raises ValueError if the result is not that plan's.
        """
        step = self._in_flight.popleft()
        self._counters.count_step(sum(step.plan.num_tokens))
        told: defaultdict[ConnectionId, StepEvents] = defaultdict(StepEvents)
        for sequence, sequence_id, start, num_tokens, token_id in step.rows(result):
            if start < sequence.commit_check_at and token_id not in sequence.stop_token_ids and token_id is not None:
                sequence.token_ids.append(token_id)
                told[sequence.connection].tokens[sequence.request_id] = token_id
            # otherwise it has meanwhile finished, been cancelled or been preempted
            elif sequence.sequence_id == sequence_id:
                event = self._commit_row(sequence, start, start + num_tokens, token_id, result)
                if event is not None:
                    told[sequence.connection].events.append(event)
        self._counters.num_output_tokens += sum(step_events.num_tokens for step_events in told.values())
        return told

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
        self._blocks.check(sequence.block_ids for sequence in self._running)

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
        for sequence in self._running.copy():
            self._preempt(sequence)
        return True

    def _is_taken(self) -> bool:
        """Whether a sequence runs that must be alone. Then it is the only one."""
        return bool(self._running) and self._running[0].must_be_alone

    def _share_out(self) -> Rows:
        """What the running sequences run in this step, with the blocks for it.

        Those with one token to run come first, so that a long prompt does not hold them up; both kinds in order. Only
        they can lack a block: the others have had theirs since they were admitted.
        """
        rows = Rows()
        sequences, starts = rows.sequences, rows.starts
        budget = self._limits.max_num_batched_tokens
        prompts: list[Sequence] = []
        without_output: list[int] = []
        # while this goes on the last in order may be preempted, which never has a row yet
        for sequence in self._running:
            if len(starts) == budget:
                break
            start = sequence.num_planned
            if start >= sequence.plan_check_at:
                num_to_run = sequence.num_to_run
                if num_to_run > 1:
                    prompts.append(sequence)
                if num_to_run != 1 or not self._make_room(sequence, rows):
                    continue
                if sequence.max_output_tokens == 0:
                    without_output.append(len(starts))
            sequence.num_planned = start + 1
            sequences.append(sequence)
            starts.append(start)
        rows.num_tokens = [1] * len(starts)
        rows.samples = [True] * len(starts)
        for row in without_output:
            rows.samples[row] = False
        budget -= len(starts)
        for sequence in prompts:
            # unless it was preempted just now
            if budget > 0 and sequence.sequence_id is not None:
                num_tokens = min(sequence.num_to_run, budget)
                rows.add(sequence, num_tokens)
                budget -= num_tokens
        return rows

    def _make_room(self, sequence: Sequence, rows: Rows) -> bool:
        """The block that one token more needs, if it needs one.

        If there is none the last in order is preempted; the last one itself waits, keeping what it has: False. The
        first always gets on.
        """
        if sequence.num_planned == len(sequence.block_ids) * self._block_size:
            while (taken := self._blocks.take(1)) is None:
                if self._running[-1] is sequence:
                    return False
                self._preempt(self._running[-1])
            sequence.block_ids += taken
            rows.new_block_ids[sequence.running_id] = taken
        sequence.plan_check_at = min(len(sequence.block_ids) * self._block_size, sequence.num_to_compute)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue: its tokens are computed anew when there is room, those that the cache lost meanwhile."""
        self._stop_running(sequence)
        insort(self._waiting, sequence, key=_order)
        self._counters.num_preemptions += 1

    def _admit(self, rows: Rows) -> list[NewSequence]:
        """Let waiting sequences run with what is left of the budget, in order; adds to `rows`."""
        new: list[NewSequence] = []
        budget = self._limits.max_num_batched_tokens - sum(rows.num_tokens)
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
            rows.new_block_ids[sequence.running_id] = sequence.block_ids.copy()
            num_tokens = min(sequence.num_to_run, budget)
            rows.add(sequence, num_tokens)
            budget -= num_tokens
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
        insort(self._running, sequence, key=_order)
        _, priority, fair_round, _ = sequence.order
        self._rounds.begin(sequence.request.client, priority=priority, joined=fair_round)
        self._prefix_cache.expect(islice(sequence.block_hashes, len(cached_ids), None), sequence_id=sequence_id)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(num_cached_tokens, sequence.num_prompt_tokens)
            if self._prefix_caching and not sequence.wants_prompt_logprobs:
                self._counters.prefix_cache_queries += sequence.num_known
                self._counters.prefix_cache_hits += num_cached_tokens
        return sequence.to_new_sequence(sequence_id)

    def _commit_row(
        self, sequence: Sequence, start: int, num_computed: int, token_id: int | None, result: StepResult
    ) -> TokenEvent | None:
        """Take in one sequence's part of a step, tokens [start, num_computed) and what was drawn from the last one;
        returns what its client must hear, if anything.
        """
        if start < sequence.num_prompt_tokens:
            self._counters.num_prompt_tokens += min(num_computed, sequence.num_prompt_tokens) - start
        if result.prompt_logprobs:
            sequence.prompt_logprobs += result.prompt_logprobs.get(sequence.running_id, ())
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        if token_id is not None:
            token_ids.append(token_id)
            sequence.token_ids.append(token_id)
            if sequence.must_be_alone:
                self._clear(sequence)
            if sequence.wants_logprobs:
                logprobs.append(result.logprobs[sequence.running_id])
        if self._prefix_caching and num_computed >= (sequence.num_blocks_published + 1) * self._block_size:
            self._publish(sequence, num_computed)
        finish = sequence.finish_reason(num_computed=num_computed)
        if not token_ids and finish is None:
            return None
        event = sequence.report(token_ids, logprobs, finish)
        if finish is not None:
            self._close(sequence)
        elif not sequence.wants_logprobs:
            sequence.commit_check_at = self._commit_check_at(sequence)
        return event

    def _commit_check_at(self, sequence: Sequence) -> int:
        """The start of the row that draws its last token or fills its next block."""
        check_at = sequence.num_to_compute - 1
        if not self._prefix_caching:
            return check_at
        return min(check_at, (sequence.num_blocks_published + 1) * self._block_size - 1)

    def _clear(self, sequence: Sequence) -> None:
        """It has drawn a token and nothing broke: from now on it is one of many."""
        sequence.must_be_alone = False
        sequence.order = (True, *sequence.order[1:])

    def _publish(self, sequence: Sequence, num_computed: int) -> None:
        """Offer the full blocks that were completed to others."""
        num_full = num_computed // self._block_size
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
        del self._open[sequence.connection, sequence.request_id]
        if sequence.sequence_id is None:
            del self._waiting[bisect_left(self._waiting, sequence.order, key=_order)]
        else:
            self._stop_running(sequence)
        _, priority, fair_round, _ = sequence.order
        self._rounds.end(sequence.request.client, priority=priority, joined=fair_round)

    def _stop_running(self, sequence: Sequence) -> None:
        del self._running[bisect_left(self._running, sequence.order, key=_order)]
        self._dropped.append(sequence.running_id)
        self._prefix_cache.expect_no_longer(
            sequence.block_hashes, start=sequence.num_blocks_published, sequence_id=sequence.running_id
        )
        self._blocks.give_back(sequence.stop())

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
