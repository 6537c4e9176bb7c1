"""A GPU that is not there: the runner of GPUs on CPU tensors, its kernels interpreted, its graphs recorded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.scheduler import Scheduler
from llmd.model import checkpoint
from llmd.model import decoder as decoder_module
from llmd.model.captured_sizes import NOTHING_CAPTURED, captured_sizes
from llmd.model.checkpoint import load_decoder
from llmd.model.decoder import Decoder
from llmd.model.kv_cache import KvCache, allocate_kv_cache
from llmd.protocol.generation import GenerateRequest
from llmd.protocol.steps import StepPlan
from llmd.worker.cpu_runner import CpuRunner
from llmd.worker.gpu_runner import GpuRunner
from llmd.worker.runner import PendingStep, Runner
from llmd_kernels import dispatch
from llmd_kernels.paged_attention import tiles, triton_ops
from tests.kernels.proof.interpreter import Launch, interpreted
from tests.worker.engine import BLOCK_SIZE, Answer, Engine
from tests.worker.recorder import RecordingStream, no_waiting

CPU = torch.device("cpu")
MAX_MODEL_LEN = 128
MAX_NUM_SEQS = 12


def load_for_cpu(folder: Path, dtype: torch.dtype) -> Decoder:
    return load_decoder(folder, dtype=dtype, device=CPU, max_model_len=MAX_MODEL_LEN)


def load_for_gpu(folder: Path, dtype: torch.dtype) -> Decoder:
    """Weights as a GPU has them: as they are, or quantised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_module, "pack_weight", lambda weight: weight)
        patch.setattr(checkpoint, "has_quantized_kernels", lambda **_: dtype.itemsize == 2)
        return load_decoder(folder, dtype=dtype, device=CPU, max_model_len=MAX_MODEL_LEN)


@contextmanager
def pretended_gpu() -> Iterator[list[Launch]]:
    """CPU tensors are a GPU's: with two processors, and splits so short that tiny contexts have several."""
    with pytest.MonkeyPatch.context() as patch, interpreted() as launches:
        patch.setattr(dispatch, "TRITON_DEVICES", {"cpu"})
        patch.setattr(triton_ops, "processors", lambda _: triton_ops.Processors("sm_90", 2))
        for numbers in ("32", "16/16", "16/8"):
            patch.setitem(tiles.TABLE, ("sm_90", 64, numbers), tiles.TileConfig(16, 16, 32, 4, 1, 1))
        yield launches


@dataclass
class NeverWaiting:
    """A runner whose launches must not wait for the device."""

    runner: Runner

    def launch(self, plan: StepPlan) -> PendingStep:
        with no_waiting():
            return self.runner.launch(plan)

    def prepare(self) -> bool:
        with no_waiting():
            return self.runner.prepare()


def make_scheduler(num_blocks: int, max_num_batched_tokens: int, *, prefix_caching: bool = False) -> Scheduler:
    return Scheduler(
        CacheConfig(block_size=BLOCK_SIZE, prefix_caching=prefix_caching),
        SchedulerConfig(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=MAX_NUM_SEQS),
        num_blocks=num_blocks,
        max_model_len=MAX_MODEL_LEN,
    )


def cache(decoder: Decoder, num_blocks: int, dtype: torch.dtype | None = None) -> KvCache:
    return allocate_kv_cache(
        decoder.spec, num_blocks=num_blocks + 1, block_size=BLOCK_SIZE, dtype=dtype or decoder.dtype, device=CPU
    )


def cpu_engine(
    decoder: Decoder, *, num_blocks: int = 100, chunk: int = 64, kv_dtype: torch.dtype | None = None
) -> Engine:
    runner = CpuRunner(decoder, cache(decoder, num_blocks, kv_dtype), block_size=BLOCK_SIZE, device=CPU)
    return Engine(make_scheduler(num_blocks, chunk), runner)


def gpu_runner(
    decoder: Decoder,
    stream: RecordingStream,
    *,
    num_blocks: int = 100,
    chunk: int = 64,
    with_graphs: bool = True,
    kv_dtype: torch.dtype | None = None,
    max_num_seqs: int = MAX_NUM_SEQS,
) -> Runner:
    """For use inside of `pretended_gpu`."""
    captured = captured_sizes(
        decoder.spec, max_num_seqs=max_num_seqs, max_num_tokens=chunk, dtype_bytes=decoder.dtype.itemsize
    )
    return NeverWaiting(
        GpuRunner(
            decoder,
            cache(decoder, num_blocks, kv_dtype),
            stream,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_tokens=chunk,
            device=CPU,
            captured=captured if with_graphs else NOTHING_CAPTURED,
        )
    )


@dataclass
class GpuRun:
    """What came of it."""

    answers: dict[int, Answer]
    stream: RecordingStream
    scheduler: Scheduler
    kernels: set[str]  # the names of those that ran


def run_on_gpu(
    decoder: Decoder,
    *batches: list[GenerateRequest],
    num_blocks: int = 100,
    chunk: int = 64,
    with_graphs: bool = True,
    prefix_caching: bool = False,
    num_prepared: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> GpuRun:
    """One batch of requests to its end, then the next. num_prepared: how often the runner may prepare itself first."""
    with pretended_gpu() as launches:
        stream = RecordingStream()
        runner = gpu_runner(
            decoder, stream, num_blocks=num_blocks, chunk=chunk, with_graphs=with_graphs, kv_dtype=kv_dtype
        )
        engine = Engine(make_scheduler(num_blocks, chunk, prefix_caching=prefix_caching), runner)
        for _ in range(num_prepared):
            engine.runner.prepare()
        answers: dict[int, Answer] = {}
        for requests in batches:
            answers |= engine.run(requests)
    kernels = {launch.kernel for launch in launches}
    return GpuRun(answers, stream, engine.scheduler, kernels)
