"""The scheduler under every order of adds, cancels, plans and commits that Hypothesis can think of.

A fake rank computes on what it reads through the block tables, so that any slip of bookkeeping changes a completion.
The large profile: `pytest tests/engine --hypothesis-profile=ci`.
"""

import random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.sequence import ConnectionId
from llmd.protocol.generation import GenerateRequest, SamplingParams
from tests.engine.drive import VOCAB_SIZE, Drive

# few roots, so that prefixes are often shared
ROOTS = [[1, 2, 3, 4, 0] * 4, [0, 0, 0, 0, 1] * 4]

requests = st.builds(
    lambda root, cut, tail, **arguments: GenerateRequest(
        request_id=0, prompt_token_ids=[*root[:cut], *tail], **arguments
    ),
    st.sampled_from(ROOTS),
    st.sampled_from([1, 2, 5, 8, 9, 12, 16, 20]),
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3),
    sampling=st.builds(
        SamplingParams,
        max_tokens=st.sampled_from([20, 12, 5, 1, 0]),
        seed=st.just(0),
        min_tokens=st.integers(0, 3),
        stop_token_ids=st.sampled_from([(), (), (0,), (1, 3)]),
        num_logprobs=st.sampled_from([None, 0]),
        num_prompt_logprobs=st.sampled_from([None, None, None, 0]),
    ),
    priority=st.integers(-1, 1),
    cache_salt=st.sampled_from(["", "", "", "a"]),
    client=st.sampled_from(["", "", "a", "b"]),
    alone=st.sampled_from([False, False, False, True]),
)


class SchedulerMachine(RuleBasedStateMachine):
    prefix_caching: Any = st.booleans()
    max_steps_in_flight: Any = st.sampled_from([2, 3, 1])

    @initialize(
        data=st.data(),
        block_size=st.sampled_from([2, 3, 1, 4]),
        num_blocks=st.sampled_from([12, 9, 16, 6, 20]),
        max_num_seqs=st.sampled_from([5, 8, 3, 1]),
        max_num_batched_tokens=st.sampled_from([16, 40, 6, 3, 1]),
        policy=st.sampled_from(["fcfs", "priority"]),
        max_model_len=st.sampled_from([60, 24, 15]),
    )
    def start(self, data: st.DataObject, block_size: int, num_blocks: int, max_model_len: int, **limits: Any) -> None:
        prefix_caching = data.draw(self.prefix_caching, "prefix_caching")
        max_steps_in_flight = data.draw(self.max_steps_in_flight, "max_steps_in_flight")
        self.drive = Drive(
            CacheConfig(block_size=block_size, prefix_caching=prefix_caching),
            SchedulerConfig(max_steps_in_flight=max_steps_in_flight, **limits),
            num_blocks=num_blocks,
            max_model_len=max_model_len,
        )

    @rule(
        request=requests,
        connection=st.integers(0, 1),
        num_done=st.sampled_from([0, 0, 0, 0, 1, 2, 5, 20]),
        num_copies=st.sampled_from([1, 3, 2]),
    )
    def add(self, request: GenerateRequest, connection: int, num_done: int, num_copies: int) -> None:
        for _ in range(num_copies):
            self.drive.add(request, connection=connection, num_done=num_done)

    @rule(connection=st.integers(0, 1), request_id=st.integers(0, 5))
    def cancel(self, connection: int, request_id: int) -> None:
        self.drive.cancel((ConnectionId(connection), request_id))

    @rule(connection=st.integers(0, 1))
    def disconnect(self, connection: int) -> None:
        self.drive.disconnect(connection)

    @rule()
    def plan(self) -> None:
        self.drive.plan()

    @precondition(lambda self: self.drive.in_flight)
    @rule()
    def commit(self) -> None:
        self.drive.commit()

    @rule(num_steps=st.sampled_from([10, 4, 1]))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.drive.step()

    def teardown(self) -> None:
        if hasattr(self, "drive"):
            self.drive.finish()


class WithoutPrefixCacheMachine(SchedulerMachine):
    prefix_caching = st.just(False)


class OneStepAtATimeMachine(SchedulerMachine):
    prefix_caching = st.just(True)
    max_steps_in_flight = st.just(1)


def as_test_case(machine: type[SchedulerMachine]) -> Any:
    is_large = settings.get_current_profile_name() == "ci"
    case = machine.TestCase
    case.settings = settings(
        deadline=None,
        max_examples=500 if is_large else 60,
        # shrinking a failing history takes minutes: a failure is reported as it was found
        phases=[Phase.reuse, Phase.generate],
    )
    return case


TestScheduler = as_test_case(SchedulerMachine)
TestWithoutPrefixCache = as_test_case(WithoutPrefixCacheMachine)
TestOneStepAtATime = as_test_case(OneStepAtATimeMachine)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_storm(seed: int, prefix_caching: bool) -> None:
    """Heavy load on a pool that is far too small: dozens of preemptions, which Hypothesis seldom gets to."""
    draw = random.Random(seed)
    block_size = draw.choice([1, 2, 3, 4])
    drive = Drive(
        CacheConfig(block_size=block_size, prefix_caching=prefix_caching),
        SchedulerConfig(
            max_num_seqs=draw.choice([4, 8, 16]),
            max_num_batched_tokens=draw.choice([8, 20, 64]),
            max_steps_in_flight=1 + seed % 3,
            policy=draw.choice(["fcfs", "priority"]),
        ),
        num_blocks=72 // block_size,
    )
    for _ in range(600):
        if len(drive.open) < 12:
            request = GenerateRequest(
                request_id=0,
                prompt_token_ids=draw.choice(ROOTS)[: draw.randint(1, 20)],
                sampling=SamplingParams(
                    max_tokens=draw.randint(1, 24),
                    seed=0,
                    stop_token_ids=draw.choice([(), (), (0,)]),
                    num_prompt_logprobs=draw.choice([None, None, 0]),
                ),
                priority=draw.randint(0, 2),
                client=draw.choice(["", "a", "b"]),
                alone=draw.random() < 0.05,
            )
            for _ in range(draw.choice([1, 1, 4])):
                drive.add(request, connection=draw.randint(0, 1))
        if draw.random() < 0.05 and drive.open:
            drive.cancel(draw.choice(list(drive.open)))
        if draw.random() < 0.3:
            drive.plan()
        else:
            drive.step()
    assert drive.statistics.num_preemptions > 5, "not the storm that this test is about"
    assert (drive.statistics.prefix_cache_hits > 100) == prefix_caching
    drive.finish()
