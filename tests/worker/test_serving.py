"""The rank's loop between a socket and a runner that the test holds in its hands."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue

import pytest

from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.steps import RankReady, StepPlan, StepResult, WorkerToEngine
from llmd.worker.runner import PendingStep
from llmd.worker.serving import serve_engine

TIMEOUT = 30.0  # seconds; a guard against hanging for ever
READY = RankReady(rank=0, num_blocks=1, max_model_len=1, vocab_size=1)


class Step:
    """Is done when the test says so."""

    def __init__(self, plan: StepPlan) -> None:
        self.outcome: Future[StepResult] = Future()
        self.plan = plan

    def finish(self) -> None:
        self.outcome.set_result(StepResult(step_id=self.plan.step_id, token_ids=[]))

    def result(self) -> StepResult:
        return self.outcome.result(TIMEOUT)


@dataclass
class HeldRunner:
    launched: "Queue[Step]" = field(default_factory=Queue)
    prepared: threading.Event = field(default_factory=threading.Event)
    num_to_prepare: int = 0
    on_launch: Callable[[], None] = lambda: None

    def launch(self, plan: StepPlan) -> PendingStep:
        self.on_launch()
        step = Step(plan)
        self.launched.put(step)
        return step

    def prepare(self) -> bool:
        if self.num_to_prepare == 0:
            return False
        self.num_to_prepare -= 1
        if self.num_to_prepare == 0:
            self.prepared.set()
        return True


class Engine:
    """The other end, which the test plays."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._decoder: FrameDecoder[WorkerToEngine] = FrameDecoder(WorkerToEngine)
        self._received: list[WorkerToEngine] = []

    def send(self, *step_ids: int) -> None:
        for step_id in step_ids:
            self.connection.sendall(
                encode_frame(StepPlan(step_id=step_id, sequence_ids=[], starts=[], num_tokens=[], samples=[]))
            )

    def receive(self) -> WorkerToEngine:
        while not self._received:
            self._received += self._decoder.feed(self.connection.recv(1000))
        return self._received.pop(0)


@dataclass
class Rank:
    runner: HeldRunner
    engine: Engine
    end: "Future[None]"


@pytest.fixture
def rank() -> Iterator[Rank]:
    ours, its = socket.socketpair()
    ours.settimeout(TIMEOUT)
    runner = HeldRunner()
    with its, ours, ThreadPoolExecutor(1) as threads:
        rank = Rank(runner, Engine(ours), threads.submit(serve_engine, runner, its, READY))
        yield rank
        ours.close()


def next_step(rank: Rank) -> Step:
    return rank.runner.launched.get(timeout=TIMEOUT)


def test_the_next_plan_is_launched_before_the_result_of_the_last_is_there(rank: Rank) -> None:
    assert rank.engine.receive() == READY
    rank.engine.send(0, 1)
    first, second = next_step(rank), next_step(rank)
    second.finish()
    first.finish()
    # answered in the order of the plans, whichever was done first
    assert rank.engine.receive() == StepResult(step_id=0, token_ids=[])
    assert rank.engine.receive() == StepResult(step_id=1, token_ids=[])


def test_no_more_than_two_are_in_flight(rank: Rank) -> None:
    assert rank.engine.receive() == READY
    answered = threading.Event()
    rank.engine.send(0, 1, 2)
    first, second = next_step(rank), next_step(rank)
    rank.runner.on_launch = lambda: assert_true(answered.is_set())
    answered.set()
    first.finish()
    assert rank.engine.receive() == StepResult(step_id=0, token_ids=[])
    for step in (second, next_step(rank)):
        step.finish()
        assert rank.engine.receive() == StepResult(step_id=step.plan.step_id, token_ids=[])


def assert_true(value: bool) -> None:
    assert value


def test_an_idle_runner_prepares_itself(rank: Rank) -> None:
    rank.engine.send(0)
    step = next_step(rank)
    # not while a step is in flight
    rank.runner.num_to_prepare = 3
    rank.engine.send(1)
    second = next_step(rank)
    assert rank.runner.num_to_prepare == 3
    step.finish()
    second.finish()
    assert rank.runner.prepared.wait(TIMEOUT)


def test_an_engine_that_goes_while_steps_run_is_a_clean_end(rank: Rank) -> None:
    assert rank.engine.receive() == READY
    rank.engine.send(0, 1)
    first, second = next_step(rank), next_step(rank)
    rank.engine.connection.close()
    first.finish()
    second.finish()
    rank.end.result(TIMEOUT)


def test_what_a_step_raises_ends_the_loop(rank: Rank) -> None:
    assert rank.engine.receive() == READY
    rank.engine.send(0, 1)
    first, second = next_step(rank), next_step(rank)
    first.outcome.set_exception(RuntimeError("the device is on fire"))
    second.finish()
    with pytest.raises(RuntimeError, match="on fire"):
        rank.end.result(TIMEOUT)


def test_what_a_launch_raises_ends_the_loop_after_the_answers_before_it(rank: Rank) -> None:
    assert rank.engine.receive() == READY

    def fail() -> None:
        raise RuntimeError("out of memory")

    rank.engine.send(0)
    first = next_step(rank)
    rank.runner.on_launch = fail
    rank.engine.send(1)
    first.finish()
    assert rank.engine.receive() == StepResult(step_id=0, token_ids=[])
    with pytest.raises(RuntimeError, match="out of memory"):
        rank.end.result(TIMEOUT)
