"""How long the scheduler takes to plan and commit one step, without HTTP, sockets or a model.

    python bench/engine_steps.py

Prints CPU microseconds a step for decoding sequences, and for prompts of 512 tokens that come in while others decode.
"""

import statistics
import time
from collections import deque

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.scheduler import Scheduler
from llmd.engine.sequence import ConnectionId
from llmd.protocol.generation import GenerateRequest, SamplingParams
from llmd.protocol.steps import StepPlan, StepResult

CONNECTION = ConnectionId(0)
MICROSECONDS = 1e6
NUM_STEPS = 400


def answer(plan: StepPlan) -> StepResult:
    """What a rank would send: the same token for everyone."""
    return StepResult(step_id=plan.step_id, token_ids=[7] * sum(plan.samples))


def add(scheduler: Scheduler, request_id: int, *, num_prompt_tokens: int, max_tokens: int) -> None:
    request = GenerateRequest(
        request_id=request_id,
        prompt_token_ids=[request_id, *range(1, num_prompt_tokens)],
        sampling=SamplingParams(max_tokens=max_tokens, seed=0, stop_token_ids=(2,)),
    )
    scheduler.add(request, connection=CONNECTION)


def measure(num_sequences: int, *, with_prompts: bool) -> list[float]:
    """CPU seconds of plan + commit for each of `NUM_STEPS` steps while `num_sequences` decode, two steps in flight."""
    limits = SchedulerConfig(max_num_seqs=num_sequences + 8, max_num_batched_tokens=num_sequences + 512)
    scheduler = Scheduler(CacheConfig(), limits, num_blocks=100_000, max_model_len=8192)
    for request_id in range(num_sequences):
        add(scheduler, request_id, num_prompt_tokens=64, max_tokens=NUM_STEPS * 2)
    in_flight: deque[StepResult] = deque()
    seconds = []
    # the first steps run the prompts
    for step in range(-64, NUM_STEPS):
        if with_prompts:
            add(scheduler, num_sequences + 64 + step, num_prompt_tokens=512, max_tokens=1)
        started = time.thread_time()
        plan = scheduler.plan()
        planned = time.thread_time()
        assert plan is not None
        in_flight.append(answer(plan))
        committing = time.thread_time()
        if len(in_flight) == limits.max_steps_in_flight:
            scheduler.commit(in_flight.popleft())
        seconds.append(planned - started + time.thread_time() - committing)
    return seconds[64:]


def main() -> None:
    print("sequences  new prompts   median µs      p99 µs")
    for num_sequences in (1, 32, 256):
        for with_prompts in (False, True):
            seconds = measure(num_sequences, with_prompts=with_prompts)
            median, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
            prompts = "one a step" if with_prompts else "none"
            print(f"{num_sequences:9}  {prompts:>11}  {median * MICROSECONDS:10.0f}  {p99 * MICROSECONDS:10.0f}")


if __name__ == "__main__":
    main()
