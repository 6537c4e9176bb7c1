"""A whole model with random weights on a machine, and runners for it: what the stage `steps` runs and times."""

import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.gpu.machine import Machine
from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.scheduler import Scheduler
from llmd.fetch import fetch
from llmd.model.captured_sizes import NOTHING_CAPTURED, captured_sizes
from llmd.model.checkpoint import load_decoder
from llmd.model.decoder import Decoder
from llmd.model.kv_cache import KvCache, allocate_kv_cache
from llmd.model.spec import load_spec
from llmd.protocol.generation import SamplingParams
from llmd.protocol.steps import NewSequence, StepPlan
from llmd.worker.device import available_memory
from llmd.worker.gpu_runner import GpuRunner
from llmd.worker.runner import MAX_STEPS_IN_FLIGHT, PendingStep
from llmd.worker.stream import Download, Stream
from tests.worker.engine import Engine

# Of what is free once the weights are there.
_KV_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights, and one KV cache for all runners, which run one after the other."""

    machine: Machine
    decoder: Decoder
    kv: KvCache

    @property
    def num_blocks(self) -> int:
        """Without the one for padding."""
        return self.kv.num_blocks - 1

    def runner(self, stream: Stream, *, max_num_tokens: int, with_graphs: bool = True) -> GpuRunner:
        """stream: one of its own. PyTorch takes no more graphs into memory whose graphs are all gone."""
        # the last runner is a cycle: its graphs go now and not while others are captured
        gc.collect()
        sizes = self.machine.sizes.steps
        max_num_seqs = max(sizes.buckets)
        captured = captured_sizes(
            self.decoder.spec,
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            dtype_bytes=self.decoder.dtype.itemsize,
        )
        return GpuRunner(
            self.decoder,
            self.kv,
            stream,
            max_model_len=sizes.max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            device=self.machine.device,
            captured=captured if with_graphs else NOTHING_CAPTURED,
        )

    def engine(self, *, max_num_tokens: int, with_graphs: bool = True) -> Engine:
        """The real scheduler and a runner of its own."""
        sizes = self.machine.sizes.steps
        scheduler = Scheduler(
            CacheConfig(block_size=self.kv.block_size, prefix_caching=False),
            SchedulerConfig(max_num_seqs=max(sizes.buckets), max_num_batched_tokens=max_num_tokens),
            num_blocks=self.num_blocks,
            max_model_len=sizes.max_model_len,
        )
        return Engine(
            scheduler, self.runner(self.machine.stream(), max_num_tokens=max_num_tokens, with_graphs=with_graphs)
        )


def load_model(machine: Machine, folder: Path) -> LoadedModel:
    """`folder`: for what the model's configuration is written to."""
    sizes = machine.sizes.steps
    model_dir = fetch(sizes.model, revision=None, cache_dir=folder, dummy=True) if sizes.model else _smallest(folder)
    spec = load_spec(model_dir)
    decoder = load_decoder(
        model_dir, dtype=torch.bfloat16, device=machine.device, max_model_len=sizes.max_model_len, dummy=True
    )
    block_size = machine.sizes.block_size
    block_bytes = 2 * len(spec.layers) * spec.num_kv_heads * block_size * spec.head_dim * torch.bfloat16.itemsize
    wanted = 1 + max(sizes.buckets) * -(-sizes.max_model_len // block_size)
    num_blocks = min(wanted, int(_KV_SHARE * available_memory(machine.device)) // block_bytes)
    kv = allocate_kv_cache(
        spec, num_blocks=num_blocks, block_size=block_size, dtype=torch.bfloat16, device=machine.device
    )
    return LoadedModel(machine, decoder, kv)


def _smallest(folder: Path) -> Path:
    """For a rehearsal: a built-in configuration would take it hours."""
    from bench.gpu.server import tiny_model

    return tiny_model(folder, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=32)


@dataclass(slots=True)
class WatchedStream:
    """Remembers the graphs that were captured, so that they can be timed without a host that feeds them."""

    stream: Stream
    graphs: list[Callable[[], None]] = field(default_factory=list)

    def upload(self, numbers: npt.NDArray[np.int32], target: Tensor) -> None:
        self.stream.upload(numbers, target)

    def download(self, source: Tensor) -> Download:
        return self.stream.download(source)

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        graph = self.stream.capture(work)
        self.graphs.append(graph)
        return graph


def decode_plans(model: LoadedModel, *, num_seqs: int, num_steps: int, chunk: int = 0) -> list[StepPlan]:
    """Steps in which so many new sequences decode, as if their prompts had been computed; then one that drops them.

    Keys and values of the prompts are whatever the cache holds: no time depends on them.
    chunk: so many tokens of another sequence's prompt are computed in each step, the same ones again and again.
    """
    context, block_size = model.machine.sizes.step_context, model.kv.block_size
    num_blocks = -(-(context + num_steps) // block_size)
    ids = list(range(num_seqs + (chunk > 0)))
    if len(ids) * num_blocks > model.num_blocks:
        raise RuntimeError(f"{len(ids)} contexts of {context} tokens do not fit into {model.num_blocks} blocks")
    sampling = SamplingParams(max_tokens=num_steps + 1, seed=0, temperature=0.0)
    plans = []
    for index in range(num_steps):
        new = [
            NewSequence(sequence_id=i, token_ids=[i % 200] * context, num_prompt_tokens=context, sampling=sampling)
            for i in (ids if index == 0 else ())
        ]
        # a sequence has all its blocks from the beginning
        new_block_ids = {i: list(range(i * num_blocks, (i + 1) * num_blocks)) for i in (ids if new else ())}
        plans.append(
            StepPlan(
                step_id=index,
                new=new,
                new_block_ids=new_block_ids,
                sequence_ids=ids,
                starts=[context - 1 + index] * num_seqs + [context - chunk] * (chunk > 0),
                num_tokens=[1] * num_seqs + [chunk] * (chunk > 0),
                samples=[True] * num_seqs + [False] * (chunk > 0),
            )
        )
    return [*plans, StepPlan(step_id=num_steps, dropped=ids, sequence_ids=[], starts=[], num_tokens=[], samples=[])]


def run_steps(runner: GpuRunner, plans: Sequence[StepPlan]) -> list[float]:
    """As the rank's loop does, but that nobody else reads results → seconds that each launch took the host."""
    launches = []
    in_flight: deque[PendingStep] = deque()
    for plan in plans:
        if len(in_flight) == MAX_STEPS_IN_FLIGHT:
            in_flight.popleft().result()
        started = time.perf_counter()
        in_flight.append(runner.launch(plan))
        launches.append(time.perf_counter() - started)
    for pending in in_flight:
        pending.result()
    return launches
