"""A sequence that may be what kills engines runs alone until it has drawn a token. Plan by plan, worked out by hand."""

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.sequence import ConnectionId
from llmd.protocol.generation import FinishReason, GenerateRequest, SamplingParams
from llmd.protocol.steps import StepPlan
from tests.engine.drive import Drive


def drive(*, max_steps_in_flight: int = 2, num_blocks: int = 100) -> Drive:
    limits = SchedulerConfig(max_num_batched_tokens=16, max_steps_in_flight=max_steps_in_flight)
    return Drive(CacheConfig(block_size=4), limits, num_blocks=num_blocks)


def request(num_prompt_tokens: int, seed: int, *, alone: bool = False, max_tokens: int = 10) -> GenerateRequest:
    """Prompts of different seeds share no block."""
    return GenerateRequest(
        request_id=0,
        prompt_token_ids=[seed, *range(1, num_prompt_tokens)],
        sampling=SamplingParams(max_tokens=max_tokens, seed=0),
        alone=alone,
    )


def rows(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """(sequence id, start, tokens) of each row."""
    assert plan is not None
    return list(zip(plan.sequence_ids, plan.starts, plan.num_tokens, strict=True))


def test_it_waits_for_the_steps_in_flight_and_then_has_the_engine_for_itself() -> None:
    d = drive()
    d.add(request(5, 0))
    d.add(request(6, 1))
    d.plan()
    d.add(request(7, 2, alone=True))
    assert d.plan() is None, "the step in flight is theirs"
    d.commit()
    plan = d.plan()
    assert rows(plan) == [(2, 0, 7)]
    assert plan is not None
    assert plan.dropped == [0, 1]
    # the next step of its own is planned ahead as ever, and nobody comes in beside it
    assert rows(d.plan()) == [(2, 7, 1)]
    d.commit()
    # it has drawn a token: the others are back, and find in the cache what was full
    assert rows(d.plan()) == [(2, 8, 1), (3, 4, 2), (4, 4, 3)]
    d.finish()
    assert d.statistics.num_preemptions == 2


def test_a_prompt_in_chunks_is_alone_to_its_end() -> None:
    d = drive(max_steps_in_flight=3)
    d.add(request(20, 0, alone=True))
    d.add(request(3, 1))
    assert [rows(d.plan()) for _ in range(3)] == [[(0, 0, 16)], [(0, 16, 4)], [(0, 20, 1)]]
    d.commit()
    assert rows(d.plan()) == [(0, 21, 1)], "what is done so far has drawn nothing"
    d.commit()
    assert rows(d.plan()) == [(0, 22, 1), (1, 0, 3)]
    d.finish()


def test_they_come_before_all_others_and_one_by_one() -> None:
    d = drive(max_steps_in_flight=1)
    d.add(request(3, 0))
    keys = [d.add(request(4 + seed, seed, alone=True), connection=seed % 2) for seed in (1, 2)]
    order = []
    for _ in range(3):
        plan = d.plan()
        assert plan is not None
        order.append(plan.num_tokens)
        d.commit()
    assert order[:2] == [[5], [6]]
    assert sorted(order[2]) == [1, 2, 3], "the first of them had to give way, and keeps the full block that it had"
    assert [key[0] for key in keys] == [ConnectionId(1), ConnectionId(0)]
    d.finish()


def test_when_it_is_cancelled_the_others_go_on() -> None:
    d = drive()
    other = d.add(request(3, 0))
    suspect = d.add(request(20, 1, alone=True))
    assert rows(d.plan()) == [(0, 0, 16)]
    d.cancel(suspect)
    assert rows(d.plan()) == [(1, 0, 3)]
    d.finish()
    assert other not in d.open


def test_when_it_is_cancelled_before_it_begins_nobody_is_disturbed() -> None:
    d = drive()
    d.add(request(3, 0))
    d.plan()
    suspect = d.add(request(5, 1, alone=True))
    assert d.plan() is None
    d.cancel(suspect)
    assert rows(d.plan()) == [(0, 3, 1)]
    d.finish()
    assert d.statistics.num_preemptions == 0


def test_the_next_waits_for_the_steps_of_one_that_was_cancelled() -> None:
    d = drive()
    first = d.add(request(20, 0, alone=True))
    d.add(request(5, 1, alone=True))
    d.plan()
    d.cancel(first)
    assert d.plan() is None
    d.commit()
    assert rows(d.plan()) == [(1, 0, 5)]
    d.finish()


def test_it_takes_blocks_from_whoever_has_them() -> None:
    d = drive(num_blocks=4)
    d.add(request(9, 0, max_tokens=4))
    d.step()
    d.step()
    d.add(request(13, 1, alone=True, max_tokens=3))
    d.finish()
    assert d.statistics.num_preemptions >= 1


def test_one_that_draws_nothing_lets_the_others_in_when_it_ends() -> None:
    d = drive(max_steps_in_flight=1)
    key = d.add(request(5, 0, alone=True, max_tokens=0))
    d.add(request(3, 1))
    assert rows(d.plan()) == [(0, 0, 5)]
    assert d.commit()[key].finish is FinishReason.LENGTH
    assert rows(d.plan()) == [(1, 0, 3)]
    d.finish()


def test_it_computes_what_a_preempted_one_was_about_to_share() -> None:
    # nobody may wait for a prefix that nobody computes any more
    d = drive()
    d.add(request(40, 0))
    d.plan()
    d.add(request(40, 0, alone=True))
    d.commit()
    assert rows(d.plan()) == [(1, 16, 16)]
    d.finish()
