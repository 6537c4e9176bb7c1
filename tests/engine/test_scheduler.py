"""What the scheduler decides, plan by plan, worked out by hand. Every plan also runs on a fake rank (see `Drive`)."""

import pytest

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.scheduler import RequestAlreadyOpen
from llmd.engine.sequence import ConnectionId
from llmd.protocol.generation import FinishReason, GenerateRequest, SamplingParams
from llmd.protocol.steps import StepPlan, StepResult
from tests.engine.drive import Drive, Key

HERE = ConnectionId(0)


def drive(*, block_size: int = 4, num_blocks: int = 100, prefix_caching: bool = True, **limits: object) -> Drive:
    return Drive(
        CacheConfig(block_size=block_size, prefix_caching=prefix_caching),
        SchedulerConfig(**{"max_num_batched_tokens": 16, **limits}),  # type: ignore[arg-type]
        num_blocks=num_blocks,
    )


def request(
    prompt: list[int], max_tokens: int = 10, *, priority: int = 0, salt: str = "", **sampling: object
) -> GenerateRequest:
    return GenerateRequest(
        request_id=0,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, seed=0, **sampling),  # type: ignore[arg-type]
        priority=priority,
        cache_salt=salt,
    )


def different(num_tokens: int, seed: int) -> list[int]:
    """A prompt that shares no block with one of another seed."""
    return [seed, *range(1, num_tokens)]


def rows(plan: StepPlan | None) -> list[tuple[int, int, int, bool]]:
    """(sequence id, start, tokens, samples) of each row."""
    assert plan is not None
    return list(zip(plan.sequence_ids, plan.starts, plan.num_tokens, plan.samples, strict=True))


def planned(drive: Drive) -> list[tuple[int, int, int, bool]]:
    """One step, planned and committed."""
    plan = drive.plan()
    drive.commit()
    return rows(plan)


def num_cached(drive: Drive, key: Key) -> int | None:
    """Prompt tokens that the cache held of a request with more than one token to come."""
    while not (events := drive.open[key].events):
        drive.step()
    return events[0].num_cached_tokens


def test_a_prompt_runs_in_chunks_and_only_the_last_one_draws() -> None:
    d = drive()
    d.add(request(different(37, 0), max_tokens=3))
    assert planned(d) == [(0, 0, 16, False)]
    assert planned(d) == [(0, 16, 16, False)]
    assert planned(d) == [(0, 32, 5, True)]
    assert planned(d) == [(0, 37, 1, True)]
    # the last token is never run, and the length is known beforehand: three tokens, three drawing steps
    assert planned(d) == [(0, 38, 1, True)]
    assert d.plan() is None
    d.finish()


def test_blocks_for_the_whole_prompt_come_first_and_then_one_by_one() -> None:
    d = drive(max_steps_in_flight=1)
    d.add(request(different(6, 0), max_tokens=5))
    plans = []
    while (plan := d.plan()) is not None:
        plans.append(plan)
        d.commit()
    # positions 0 … 9 are run: 6 of the prompt and 4 of the output, in three blocks of four
    assert [plan.new_block_ids for plan in plans] == [{0: [0, 1]}, {}, {}, {0: [2]}, {}]


def test_steps_are_planned_before_the_tokens_are_known() -> None:
    d = drive(max_steps_in_flight=3)
    key = d.add(request([1, 2, 3], max_tokens=4))
    assert [rows(d.plan()) for _ in range(3)] == [[(0, 0, 3, True)], [(0, 3, 1, True)], [(0, 4, 1, True)]]
    assert d.plan() is None, "three are in flight"
    d.commit()
    assert rows(d.plan()) == [(0, 5, 1, True)]
    d.commit()
    assert d.plan() is None, "all four tokens are under way"
    assert len(d.open[key].events) == 2
    d.finish()
    assert d.rank.num_tokens == 3 + 3


def test_a_stop_token_costs_one_row_and_its_result_is_dropped() -> None:
    d = drive()
    prompt = [1, 2, 3]
    first_token = d.expected(request(prompt)).token_ids[0]
    key = d.add(request(prompt, stop_token_ids=(first_token,)))
    d.plan()
    d.plan()
    assert d.commit()[key].finish is FinishReason.STOP
    assert d.statistics.num_free_blocks == 100
    assert d.commit() == {}
    d.finish()


def test_max_tokens_zero_computes_the_prompt_and_says_so() -> None:
    d = drive(max_num_batched_tokens=4)
    key = d.add(request([1, 2, 3, 4, 0], max_tokens=0, num_prompt_logprobs=0))
    assert planned(d) == [(0, 0, 4, False)]
    plan = d.plan()
    assert rows(plan) == [(0, 4, 1, False)]
    event = d.commit()[key]
    assert (event.token_ids, event.finish) == ([], FinishReason.LENGTH)
    assert [logprobs.token_id for logprobs in event.prompt_logprobs or []] == [2, 3, 4, 0]


def test_a_full_context_ends_the_answer() -> None:
    d = drive(num_blocks=3)
    key = d.add(request(different(10, 0), max_tokens=100))
    d.step()
    event = d.open[key].events[0]
    assert event.finish is None
    d.finish()
    assert d.statistics.num_output_tokens == 2


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(12, 1), (13, 0)])
def test_a_prompt_that_can_never_fit_is_refused_in_words(num_prompt: int, max_tokens: int) -> None:
    d = drive(num_blocks=3)
    event = d.scheduler.add(request(different(num_prompt, 0), max_tokens=max_tokens), connection=HERE)
    assert event is not None
    assert event.finish is FinishReason.ERROR
    assert event.error == (
        "This model's maximum context length is 12 tokens, but the prompt has "
        f"{num_prompt}, which leaves no room for an answer. Shorten the prompt."
    )
    assert d.scheduler.is_idle


def test_a_prompt_without_tokens_is_refused() -> None:
    event = drive().scheduler.add(request([]), connection=HERE)
    assert event is not None
    assert "no tokens" in (event.error or "")


def test_a_request_id_is_free_again_only_after_its_end() -> None:
    d = drive()
    d.add(request([1]))
    with pytest.raises(RequestAlreadyOpen, match="request 0"):
        d.scheduler.add(request([2]), connection=HERE)
    assert d.scheduler.add(request([2]), connection=ConnectionId(1)) is None


def test_a_resumed_request_goes_on_where_it_was() -> None:
    d = drive()
    prompt = different(5, 1)
    d.add(request(prompt, max_tokens=8), num_done=3)
    plan = d.plan()
    assert plan is not None
    assert plan.new[0].num_prompt_tokens == 5
    assert plan.new[0].token_ids == prompt + d.expected(request(prompt, max_tokens=8)).token_ids[:3]
    assert rows(plan) == [(0, 0, 8, True)]
    d.finish()
    assert d.statistics.num_output_tokens == 5


def test_a_rank_that_draws_nothing_is_a_bug() -> None:
    d = drive()
    d.add(request([1]))
    d.scheduler.plan()
    with pytest.raises(ValueError, match="drew 0 tokens, not 1"):
        d.scheduler.commit(StepResult(step_id=0, token_ids=[]))


def test_running_sequences_come_first_and_prompts_fill_the_rest() -> None:
    d = drive()
    d.add(request(different(3, 0)))
    d.add(request(different(4, 1)))
    assert planned(d) == [(0, 0, 3, True), (1, 0, 4, True)]
    d.add(request(different(20, 2)))
    d.add(request(different(5, 3)))
    assert planned(d) == [(0, 3, 1, True), (1, 4, 1, True), (2, 0, 14, False)]
    assert planned(d) == [(0, 4, 1, True), (1, 5, 1, True), (2, 14, 6, True), (3, 0, 5, True)]
    d.finish()


def test_a_long_prompt_does_not_hold_up_sequences_that_came_later() -> None:
    # the first in order becomes the long one: preempted, it comes back with all its tokens
    d = drive(policy="priority")
    d.add(request(different(4, 1), priority=1))
    d.step()
    d.add(request(different(40, 0), priority=0))
    plan = d.plan()
    assert rows(plan)[0][2] == 1
    assert rows(plan)[1][1:] == (0, 15, False)
    d.commit()
    assert rows(d.plan())[0] == (0, 6, 1, True), "the short one is served first though it is lower in order"


def test_no_more_sequences_than_allowed_run_at_once() -> None:
    d = drive(max_num_seqs=2)
    keys = [d.add(request(different(2, seed), max_tokens=1 + seed)) for seed in range(3)]
    assert [row[0] for row in planned(d)] == [0, 1]
    assert keys[0] not in d.open
    assert [row[0] for row in planned(d)] == [1, 2]
    assert (d.statistics.num_running, d.statistics.num_waiting) == (1, 0)


def test_priority_orders_the_queue_only_where_it_is_the_policy() -> None:
    for policy, order in (("fcfs", [5, 1, 9]), ("priority", [1, 5, 9])):
        d = drive(policy=policy, max_num_seqs=1)
        for priority, length in ((1, 5), (0, 1), (1, 9)):
            d.add(request(different(length, length), max_tokens=1, priority=priority))
        assert [planned(d)[0][2] for _ in range(3)] == order


def test_the_newest_gives_way_when_blocks_run_out_and_comes_back_whole() -> None:
    d = drive(num_blocks=4, prefix_caching=False, max_steps_in_flight=1)
    old, new = d.add(request(different(7, 0), max_tokens=5)), d.add(request(different(7, 1), max_tokens=3))
    assert planned(d) == [(0, 0, 7, True), (1, 0, 7, True)]
    assert planned(d) == [(0, 7, 1, True), (1, 7, 1, True)]
    # position 8 needs a third block, and there are four in all
    plan = d.plan()
    assert rows(plan) == [(0, 8, 1, True)]
    assert (d.statistics.num_preemptions, d.statistics.num_waiting) == (1, 1)
    assert plan is not None
    assert plan.dropped == [1]
    d.commit()
    # the old one draws its last token; then the new one is back under another id, with its two tokens of output
    while new in d.open and (plan := d.plan()) is not None and not plan.new:
        d.commit()
    assert old not in d.open
    assert plan is not None
    assert [(n.sequence_id, len(n.token_ids), n.num_prompt_tokens) for n in plan.new] == [(2, 9, 7)]
    assert rows(plan) == [(2, 0, 9, True)]
    d.finish()


@pytest.mark.parametrize("num_prompt_logprobs", [None, 0])
def test_who_gives_way_half_way_through_its_prompt_reports_as_if_it_had_not(num_prompt_logprobs: int | None) -> None:
    d = drive(num_blocks=8, max_num_batched_tokens=8, max_steps_in_flight=1)
    d.add(request(different(7, 0), max_tokens=12))
    key = d.add(request(different(24, 1), max_tokens=2, num_prompt_logprobs=num_prompt_logprobs))
    assert planned(d) == [(0, 0, 7, True), (1, 0, 1, False)]
    assert planned(d) == [(0, 7, 1, True), (1, 1, 7, False)]
    assert planned(d) == [(0, 8, 1, True)]
    assert d.statistics.num_preemptions == 1
    # when it is back it finds its own two blocks, unless it needs the logits of its whole prompt
    while (plan := d.plan()) is not None and not plan.new:
        d.commit()
    assert rows(plan)[0][1] == (8 if num_prompt_logprobs is None else 0)
    d.commit()
    # but the client is told what was there when the request came; `Drive` looks at the prompt's logprobs
    assert num_cached(d, key) == 0
    d.finish()


def test_prompt_logprobs_that_are_out_are_not_computed_again() -> None:
    d = drive(num_blocks=4, max_steps_in_flight=1)
    d.add(request(different(7, 0), max_tokens=5))
    d.add(request(different(7, 1), max_tokens=3, num_prompt_logprobs=0))
    for _ in range(3):
        d.step()
    assert d.statistics.num_preemptions == 1
    while (plan := d.plan()) is not None and not plan.new:
        d.commit()
    assert plan is not None
    assert plan.new[0].sampling.num_prompt_logprobs is None
    assert rows(plan) == [(2, 4, 5, True)], "and so the cache may be read"
    d.finish()


def test_the_lowest_priority_gives_way_though_it_came_first() -> None:
    d = drive(num_blocks=4, prefix_caching=False, policy="priority", max_steps_in_flight=1)
    d.add(request(different(6, 0), priority=5))
    assert planned(d) == [(0, 0, 6, True)]
    d.add(request(different(7, 1), priority=0))
    assert planned(d) == [(0, 6, 1, True), (1, 0, 7, True)]
    assert planned(d) == [(1, 7, 1, True), (0, 7, 1, True)]
    assert planned(d) == [(1, 8, 1, True)]
    d.finish()


def test_results_of_an_admission_that_is_over_are_not_taken() -> None:
    d = drive(num_blocks=4, prefix_caching=False, max_steps_in_flight=3)
    d.add(request(different(7, 0), max_tokens=6))
    newer = d.add(request(different(7, 1), max_tokens=3))
    # both are in flight up to position 7 when position 8 of the older one preempts the newer one
    for _ in range(3):
        d.plan()
    assert d.statistics.num_preemptions == 1
    assert newer not in d.commit()
    d.finish()


def test_a_cancelled_sequence_is_forgotten_by_the_ranks_in_the_next_step() -> None:
    d = drive()
    keys = [d.add(request(different(3, seed))) for seed in range(2)]
    d.plan()
    d.cancel(keys[0])
    assert d.statistics.num_free_blocks == 99
    plan = d.plan()
    assert plan is not None
    assert plan.dropped == [0]
    assert rows(plan) == [(1, 3, 1, True)]
    assert set(d.commit()) == {keys[1]}


def test_a_prefix_is_found_up_to_the_last_full_block_but_never_the_last_token() -> None:
    d = drive()
    d.add(request(different(12, 0), max_tokens=1))
    d.step()
    shared = [
        (different(12, 0), 8),  # the last token's logits are needed: its block is computed again
        (different(13, 0), 12),
        ([*different(12, 0), 7, 7], 12),
        ([*different(9, 0), 7, 7], 8),
        ([7, *different(12, 0)], 0),
    ]
    for prompt, expected in shared:
        key = d.add(request(prompt, max_tokens=2))
        assert num_cached(d, key) == expected
        d.cancel(key)
    assert d.statistics.prefix_cache_queries == 12 + sum(len(prompt) for prompt, _ in shared)
    assert d.statistics.prefix_cache_hits == sum(expected for _, expected in shared)


def test_output_is_shared_too_once_its_blocks_are_full() -> None:
    d = drive()
    first = request(different(6, 0), max_tokens=7)
    d.add(first)
    d.finish()
    conversation = [*different(6, 0), *d.expected(first).token_ids, 3, 3]
    key = d.add(request(conversation, max_tokens=2))
    # 12 tokens were run (the last of 13 never is): three blocks of four
    assert num_cached(d, key) == 12


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (request(different(9, 0), 1, salt="a"), request(different(9, 0), 2, salt="b")),
        (request(different(9, 0), 1), request(different(9, 0), 2, num_prompt_logprobs=0)),
    ],
    ids=["another salt", "prompt logprobs need all logits"],
)
def test_a_prefix_that_must_not_be_shared_is_not(first: GenerateRequest, second: GenerateRequest) -> None:
    d = drive()
    d.add(first)
    d.step()
    key = d.add(second)
    assert num_cached(d, key) == 0


def test_a_burst_with_one_prefix_computes_it_once() -> None:
    d = drive(max_steps_in_flight=1)
    keys = [d.add(request(different(40, 0), max_tokens=3)) for _ in range(4)]
    assert planned(d) == [(0, 0, 16, False)]
    # the others wait for the blocks that the first one is computing
    assert planned(d) == [(0, 16, 16, False)]
    assert planned(d) == [(0, 32, 8, True)]
    assert planned(d) == [(0, 40, 1, True), (1, 36, 4, True), (2, 36, 4, True), (3, 36, 4, True)]
    assert num_cached(d, keys[3]) == 36
    d.finish()
    assert d.statistics.num_prompt_tokens == 40 + 3 * 4


def test_a_block_is_shared_only_once_its_step_is_committed() -> None:
    d = drive()
    d.add(request(different(24, 0)))
    d.plan()
    d.plan()
    d.add(request(different(24, 0)))
    d.commit()
    assert [row[0] for row in rows(d.plan())] == [0], "16 tokens are there, but the block after them is in flight"
    d.commit()
    assert rows(d.plan()) == [(0, 25, 1, True), (1, 20, 4, True)]
    d.finish()


def test_who_waits_for_a_prefix_does_not_hold_up_the_others() -> None:
    d = drive()
    d.add(request(different(10, 0)))
    d.add(request(different(10, 0)))
    d.add(request(different(3, 1)))
    assert rows(d.plan()) == [(0, 0, 10, True), (1, 0, 3, True)]


def test_who_waits_for_a_prefix_computes_it_when_its_owner_is_cancelled() -> None:
    d = drive()
    owner, waiting = d.add(request(different(40, 0))), d.add(request(different(40, 0)))
    d.plan()
    d.plan()
    d.cancel(owner)
    d.commit()
    d.commit()
    plan = d.plan()
    assert plan is not None
    assert [(row[0], row[1]) for row in rows(plan)] == [(1, 0)]
    d.finish()
    assert waiting not in d.open


def test_the_cache_gives_up_what_was_used_longest_ago() -> None:
    d = drive(num_blocks=6)
    for seed in (0, 1):
        d.add(request(different(9, seed), max_tokens=1))
        d.step()
    # prefix 0 is used again; then a prompt needs the two empty blocks and two of the four cached ones
    d.add(request(different(9, 0), max_tokens=1))
    d.step()
    d.add(request(different(13, 2), max_tokens=1))
    d.step()
    found = {}
    for seed in (0, 1):
        key = d.add(request(different(9, seed), max_tokens=2))
        found[seed] = num_cached(d, key)
        d.cancel(key)
    assert found == {0: 8, 1: 0}
