"""A rank's life: load the model, lay out memory, meet the engine, run its plans in order."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from llmd.child import ControlChannel
from llmd.config import WorkerConfig
from llmd.errors import StartupFailed
from llmd.machine import num_free_cores
from llmd.model.checkpoint import load_decoder, load_without_memory
from llmd.model.decoder import Decoder
from llmd.model.kv_cache import KvCache, allocate_kv_cache
from llmd.model.ledger import MemoryLedger, plan_memory
from llmd.model.spec import ModelSpec, load_spec
from llmd.protocol.control import ChildProgress, ChildReady, Line, Stage
from llmd.protocol.steps import RankReady
from llmd.worker.compiling import compiling_beside, digest_of
from llmd.worker.cpu_runner import CpuRunner
from llmd.worker.device import available_memory, choose_device, choose_dtype, choose_kv_dtype
from llmd.worker.gpu_runner import GpuRunner
from llmd.worker.rehearsal import NoStream, rehearse
from llmd.worker.serving import serve_engine
from llmd.worker.stream import CudaStream, Stream
from llmd_kernels.compiled_kernels import keep_compiled_kernels

_PROGRESS_INTERVAL = 0.1  # seconds between two messages


def run_rank(config: WorkerConfig, control: ControlChannel) -> None:
    """Serve one engine. Returns when it is gone. Raises StartupFailed if the model cannot be run here."""
    device = choose_device(config.model.device)
    dtype = choose_dtype(config.model.dtype, device)
    if device.type == "cpu":
        torch.set_num_threads(config.model.threads or num_free_cores())

    kv_dtype = choose_kv_dtype(config.cache.dtype, dtype)
    model_dir = Path(config.model_dir)
    spec = load_spec(model_dir)
    memory = plan_memory(
        spec,
        dtype_bytes=dtype.itemsize,
        kv_dtype_bytes=kv_dtype.itemsize,
        available_bytes=available_memory(device),
        on_cpu=device.type == "cpu",
        model=config.model,
        cache=config.cache,
        scheduler=config.scheduler,
        num_blocks=config.num_blocks,
    )
    for line in memory.lines():
        control.send(Line(line))
    compiling = (
        nullcontext() if device.type == "cpu" else compiling_kernels(config, control, spec, memory, dtype, kv_dtype)
    )
    try:
        with compiling:
            model = load_decoder(
                model_dir,
                dtype=dtype,
                device=device,
                # not what memory has reduced it to: some ropes depend on it, and an answer must not depend on free
                # memory
                max_model_len=memory.wanted_model_len,
                dummy=config.model.load_format == "dummy",
                progress=_report_progress(control),
            )
            kv = _allocate_kv_cache(config, spec, memory, kv_dtype, device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise StartupFailed(f"the memory for weights and KV cache is not there: {error}") from error
    runner = _make_runner(config, model, kv, memory, device)
    if isinstance(runner, GpuRunner) and not (runner.captured.rows or config.model.enforce_eager):
        control.send(Line("steps are not captured as CUDA graphs: attention has no kernel for this model here"))
    control.send(ChildReady())
    ready = RankReady(
        rank=config.rank,
        num_blocks=memory.num_blocks,
        max_model_len=memory.max_model_len,
        vocab_size=spec.vocab_size,
    )
    with socket.socket(fileno=config.engine_fd) as engine:
        serve_engine(runner, engine, ready)


def _allocate_kv_cache(
    config: WorkerConfig, spec: ModelSpec, memory: MemoryLedger, dtype: torch.dtype, device: torch.device
) -> KvCache:
    # one block more than the scheduler knows of: padding tokens write there
    return allocate_kv_cache(
        spec, num_blocks=memory.num_blocks + 1, block_size=config.cache.block_size, dtype=dtype, device=device
    )


def compiling_kernels(
    config: WorkerConfig,
    control: ControlChannel,
    spec: ModelSpec,
    memory: MemoryLedger,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> AbstractContextManager[None]:
    """Inside, the model's kernels are compiled for the GPU, unless an earlier start has done so."""
    try:
        kept = keep_compiled_kernels(Path(config.model.cache_dir) / "kernels", torch.device("cuda", 0))
    except OSError as error:
        raise StartupFailed(f"compiled kernels cannot be kept: {error}. Choose another --download-dir") from error

    def rehearsal() -> Iterator[None]:
        model = load_without_memory(Path(config.model_dir), dtype=dtype, max_model_len=memory.wanted_model_len)
        model = model.with_unlike_layers()
        short = replace(spec, layers=spec.layers[: model.num_layers])
        kv = _allocate_kv_cache(config, short, memory, kv_dtype, model.device)
        yield from rehearse(
            _gpu_runner(config, model, kv, memory, NoStream()),
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=memory.max_model_len,
        )

    lens = (memory.max_model_len, memory.wanted_model_len)
    facts = (spec, lens, dtype, kv_dtype, config.model.enforce_eager, config.cache.block_size, config.scheduler)
    return compiling_beside(
        rehearsal,
        done=kept / "complete" / digest_of(*facts),
        progress=lambda done: control.send(
            ChildProgress(stage=Stage.LOADING, detail="compiling kernels", progress=done)
        ),
    )


def _make_runner(
    config: WorkerConfig, model: Decoder, kv: KvCache, memory: MemoryLedger, device: torch.device
) -> CpuRunner | GpuRunner:
    if device.type == "cpu":
        return CpuRunner(model, kv, block_size=kv.block_size, device=device)
    return _gpu_runner(config, model, kv, memory, CudaStream(device))


def _gpu_runner(config: WorkerConfig, model: Decoder, kv: KvCache, memory: MemoryLedger, stream: Stream) -> GpuRunner:
    return GpuRunner(
        model,
        kv,
        stream,
        max_model_len=memory.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_tokens=config.scheduler.max_num_batched_tokens,
        device=model.device,
        captured=memory.captured,
    )


def _report_progress(control: ControlChannel) -> Callable[[int, int], None]:
    last_sent = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last_sent
        now = time.monotonic()
        if now - last_sent >= _PROGRESS_INTERVAL:
            last_sent = now
            control.send(ChildProgress(stage=Stage.LOADING, detail="loading weights", progress=done / total))

    return report
