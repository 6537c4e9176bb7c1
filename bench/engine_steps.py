"""What one decode step costs the engine, without HTTP and without a model.

    python bench/engine_steps.py

Prints CPU microseconds a step, by part: to plan, the plan to bytes, a result from bytes, to commit, what servers must
hear to bytes. Sequences decode, alone or while prompts of 512 tokens come in. Then the same decoding by the whole
engine process, sockets and Trio included: another process answers each plan after a few milliseconds, as a rank does.
"""

import multiprocessing
import socket
import statistics
import threading
import time
from collections import deque
from itertools import pairwise
from queue import SimpleQueue

import trio

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.loop import EngineLoop
from llmd.engine.ranks import connect_ranks
from llmd.engine.scheduler import Scheduler
from llmd.engine.sequence import ConnectionId
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.generation import EngineReady, GenerateRequest, SamplingParams
from llmd.protocol.steps import EngineToWorker, RankReady, StepPlan, StepResult, WorkerToEngine

CONNECTION = ConnectionId(0)
MICROSECONDS = 1e6
NUM_STEPS = 400
NUM_UNMEASURED = 64  # the first steps run the prompts
PARTS = ("plan", "encode", "decode", "commit", "tell")
NUM_BLOCKS, MAX_MODEL_LEN, VOCAB_SIZE = 100_000, 8192, 1000
STEP_SECONDS = 0.004  # of a rank
POLL_SECONDS = 0.05
RECEIVE_SIZE = 1 << 18  # bytes


def answer(plan: StepPlan) -> StepResult:
    """What a rank would send: the same token for everyone."""
    return StepResult(step_id=plan.step_id, token_ids=[7] * sum(plan.samples))


def make_request(request_id: int, *, num_prompt_tokens: int, max_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=[request_id, *range(1, num_prompt_tokens)],
        sampling=SamplingParams(max_tokens=max_tokens, seed=0, stop_token_ids=(2,)),
    )


def decoding_requests(num_sequences: int) -> list[GenerateRequest]:
    """Of several lengths: blocks fill up in different steps."""
    return [
        make_request(request_id, num_prompt_tokens=64 + request_id % 16, max_tokens=MAX_MODEL_LEN)
        for request_id in range(num_sequences)
    ]


def make_scheduler(num_sequences: int) -> Scheduler:
    limits = SchedulerConfig(max_num_seqs=num_sequences + 8, max_num_batched_tokens=num_sequences + 512)
    return Scheduler(CacheConfig(), limits, num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN)


def measure_parts(num_sequences: int, *, with_prompts: bool) -> list[tuple[float, ...]]:
    """CPU seconds of each of PARTS, a row a step, while `num_sequences` decode, two steps in flight."""
    scheduler = make_scheduler(num_sequences)
    decoder: FrameDecoder[WorkerToEngine] = FrameDecoder(WorkerToEngine)
    for request in decoding_requests(num_sequences):
        scheduler.add(request, connection=CONNECTION)
    in_flight: deque[bytes] = deque()
    seconds = []
    for step in range(NUM_UNMEASURED + NUM_STEPS):
        if with_prompts:
            request = make_request(num_sequences + step, num_prompt_tokens=512, max_tokens=1)
            scheduler.add(request, connection=CONNECTION)
        times = [time.thread_time()]
        plan = scheduler.plan()
        times.append(time.thread_time())
        encode_frame(plan)
        times.append(time.thread_time())
        assert plan is not None
        in_flight.append(encode_frame(answer(plan)))
        if len(in_flight) < 2:
            continue
        skipped = time.thread_time() - times[-1]
        (result,) = decoder.feed(in_flight.popleft())
        times.append(time.thread_time() - skipped)
        assert isinstance(result, StepResult)
        told = scheduler.commit(result)
        times.append(time.thread_time() - skipped)
        for events in told.values():
            encode_frame(events)
        times.append(time.thread_time() - skipped)
        seconds.append(tuple(after - before for before, after in pairwise(times)))
    return seconds[NUM_UNMEASURED:]


def be_rank_and_server(rank: socket.socket, server: socket.socket, num_sequences: int) -> None:
    """The other ends of an engine's sockets, in a process of their own; ends with the engine."""
    plans: SimpleQueue[StepPlan] = SimpleQueue()

    def take_plans() -> None:
        decoder: FrameDecoder[EngineToWorker] = FrameDecoder(EngineToWorker)
        while data := rank.recv(RECEIVE_SIZE):
            for plan in decoder.feed(data):
                plans.put(plan)

    def run_plans() -> None:
        while True:
            result = encode_frame(answer(plans.get()))
            time.sleep(STEP_SECONDS)
            rank.sendall(result)

    rank.sendall(
        encode_frame(RankReady(rank=0, num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE))
    )
    for work in (take_plans, run_plans):
        threading.Thread(target=work, daemon=True).start()
    server.sendall(b"".join(map(encode_frame, decoding_requests(num_sequences))))
    while server.recv(RECEIVE_SIZE):
        pass


async def run_engine(rank: socket.socket, server: socket.socket, num_sequences: int) -> float:
    """CPU seconds a step of this process, over NUM_STEPS steps."""
    ranks = await connect_ranks([trio.SocketStream(trio.socket.from_stdlib_socket(rank))])
    scheduler = make_scheduler(num_sequences)
    ready = EngineReady(max_model_len=MAX_MODEL_LEN, block_size=16, num_blocks=NUM_BLOCKS, vocab_size=VOCAB_SIZE)
    loop = EngineLoop(scheduler, ranks, ready=ready)

    async def wait_steps(num_steps: int) -> int:
        while scheduler.statistics().num_steps < num_steps:
            await trio.sleep(POLL_SECONDS)
        return scheduler.statistics().num_steps

    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        nursery.start_soon(loop.serve, trio.SocketStream(trio.socket.from_stdlib_socket(server)))
        first = await wait_steps(NUM_UNMEASURED)
        started = time.process_time()
        last = await wait_steps(first + NUM_STEPS)
        seconds = (time.process_time() - started) / (last - first)
        nursery.cancel_scope.cancel()
    return seconds


def measure_process(num_sequences: int) -> float:
    """CPU seconds a step."""
    rank, rank_end = socket.socketpair()
    server, server_end = socket.socketpair()
    peer = multiprocessing.get_context("spawn").Process(
        target=be_rank_and_server, args=(rank_end, server_end, num_sequences), daemon=True
    )
    peer.start()
    seconds = trio.run(run_engine, rank, server, num_sequences)
    peer.terminate()
    peer.join()
    return seconds


def main() -> None:
    print("sequences  new prompts" + "".join(f"{part:>8}" for part in PARTS) + "   median µs      p99 µs")
    for num_sequences in (1, 32, 256):
        for with_prompts in (False, True):
            seconds = measure_parts(num_sequences, with_prompts=with_prompts)
            prompts = "one a step" if with_prompts else "none"
            parts = "".join(f"{statistics.median(part) * MICROSECONDS:8.0f}" for part in zip(*seconds, strict=True))
            steps = [sum(step) * MICROSECONDS for step in seconds]
            median, p99 = statistics.median(steps), statistics.quantiles(steps, n=100)[98]
            print(f"{num_sequences:9}  {prompts:>11}{parts}  {median:10.0f}  {p99:10.0f}")
    print("sequences  whole process, µs a step")
    for num_sequences in (1, 32, 256):
        print(f"{num_sequences:9}  {measure_process(num_sequences) * MICROSECONDS:24.0f}")


if __name__ == "__main__":
    main()
