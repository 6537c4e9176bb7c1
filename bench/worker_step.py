"""How long a worker's host works for one decode step of a GPU, without the GPU.

    python bench/worker_step.py

Prints CPU microseconds a step: the frame's bytes to a plan, `GpuRunner.launch`, `PendingStep.result`, the result to
bytes; of each the median. Then of a whole step the fastest tenth, which other work on the machine disturbs least, the
median and the slowest. Frames, packing and answers are real; what the device would do costs nothing.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.scheduler import Scheduler
from llmd.engine.sequence import ConnectionId
from llmd.model.captured_sizes import ROW_SIZES, CapturedSizes
from llmd.model.inputs import ModelInputs
from llmd.model.kv_cache import KvCache, LayerCache
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.generation import GenerateRequest, SamplingParams
from llmd.protocol.steps import EngineToWorker, StepPlan, StepResult
from llmd.worker import gpu_runner
from llmd.worker.gpu_runner import GpuRunner
from llmd.worker.runner import PendingStep
from llmd.worker.stream import Download
from llmd_kernels import AttentionWork, DeviceSampling, LayerKind
from llmd_kernels.paged_attention.workspace import Scratch

NUM_STEPS = 400
NUM_UNMEASURED = 64  # the first steps run the prompts
PARTS = ("decode", "launch", "result", "encode")
BLOCK_SIZE = 16
NUM_BLOCKS = 20_000
MAX_MODEL_LEN = 2048
CPU = torch.device("cpu")


class IdleStream:
    """A device that does nothing; what it drew has arrived at once."""

    def upload(self, numbers: npt.NDArray[np.int32], target: Tensor) -> None: ...

    def download(self, source: Tensor) -> Download:
        return Arrived(source)

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        return lambda: None


class Arrived:
    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers

    def wait(self) -> Tensor:
        return self._numbers


class IdleModel:
    """A network that draws what is in memory."""

    layer_kinds: Sequence[LayerKind] = ()
    hidden_size = 8
    dtype = torch.float32
    can_draw = True

    def hidden(self, inputs: ModelInputs, kv: KvCache) -> Tensor:
        return torch.zeros(len(inputs.logit_rows), self.hidden_size)

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.zeros(len(hidden), 16)

    def draw(self, hidden: Tensor, sampling: DeviceSampling) -> Tensor:
        return torch.zeros(len(hidden), dtype=torch.int64)


def make_runner(num_sequences: int) -> GpuRunner:
    nothing = torch.zeros(NUM_BLOCKS + 1, 1, BLOCK_SIZE, 1)
    cache = LayerCache(nothing, nothing, k_scales=None, v_scales=None)
    return GpuRunner(
        IdleModel(),
        KvCache((cache,), num_blocks=NUM_BLOCKS + 1, block_size=BLOCK_SIZE),
        IdleStream(),
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=num_sequences,
        max_num_tokens=8192,
        device=CPU,
        captured=CapturedSizes(rows=ROW_SIZES),
    )


def plans(num_sequences: int, sampling: dict[str, float]) -> Iterator[StepPlan]:
    """What an engine sends while so many sequences decode."""
    limits = SchedulerConfig(max_num_seqs=num_sequences, max_num_batched_tokens=8192)
    scheduler = Scheduler(CacheConfig(block_size=BLOCK_SIZE), limits, num_blocks=NUM_BLOCKS, max_model_len=8192)
    for request_id in range(num_sequences):
        parameters = SamplingParams(max_tokens=1000, seed=request_id, stop_token_ids=(2,), **sampling)
        # of several lengths: blocks fill up in different steps
        prompt = [request_id, *range(1, 64 + request_id % BLOCK_SIZE)]
        request = GenerateRequest(request_id=request_id, prompt_token_ids=prompt, sampling=parameters)
        scheduler.add(request, connection=ConnectionId(0))
    while (plan := scheduler.plan()) is not None:
        yield plan
        scheduler.commit(StepResult(step_id=plan.step_id, token_ids=[7] * sum(plan.samples)))


def measure(num_sequences: int, sampling: dict[str, float]) -> npt.NDArray[np.float64]:
    """CPU seconds of each of PARTS, a row a step, one more step being launched before each result."""
    runner = make_runner(num_sequences)
    decoder: FrameDecoder[EngineToWorker] = FrameDecoder(EngineToWorker)
    launched: deque[PendingStep] = deque()
    seconds = []
    for plan in islice(plans(num_sequences, sampling), NUM_UNMEASURED + NUM_STEPS):
        frame = encode_frame(plan)
        times = [time.thread_time()]
        (received,) = decoder.feed(frame)
        times.append(time.thread_time())
        launched.append(runner.launch(received))
        times.append(time.thread_time())
        if len(launched) > 1:
            result = launched.popleft().result()
            times.append(time.thread_time())
            encode_frame(result)
            times.append(time.thread_time())
            seconds.append(np.diff(times))
    return np.array(seconds[NUM_UNMEASURED:])


@contextmanager
def idle_kernels() -> Iterator[None]:
    """Kernels that do nothing."""
    no_lists = AttentionWork({}, Scratch(*(torch.zeros(0) for _ in fields(Scratch))))
    with mock.patch.multiple(
        gpu_runner,
        allocate_work=lambda *_, **__: no_lists,
        write_differences=lambda *_, **__: None,
        step_inputs=lambda *_, **__: None,
        append_token_ids=lambda *_: None,
        sample_on_device=lambda logits, _: torch.zeros(len(logits), dtype=torch.int64),
    ):
        yield


def main() -> None:
    print("sequences  drawn     " + "".join(f"{part:>9}" for part in PARTS) + "   tenth µs   median µs      p99 µs")
    for num_sequences in (1, 32, 256):
        for how, sampling in (("plainly", {"temperature": 0.7}), ("by top_p", {"top_p": 0.9})):
            with idle_kernels():
                seconds = measure(num_sequences, sampling) * 1e6
            parts = "".join(f"{part:9.0f}" for part in np.median(seconds, axis=0))
            whole = seconds.sum(axis=1)
            quantiles = "".join(f"  {np.quantile(whole, share):10.0f}" for share in (0.1, 0.5, 0.99))
            print(f"{num_sequences:9}  {how:9} {parts}{quantiles}")


if __name__ == "__main__":
    main()
