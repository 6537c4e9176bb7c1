"""The rehearsal finds every kernel that steps of any kind and size will launch, for a GPU that is not there."""

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from make_tiny_model import make_tiny_model
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from llmd.child import ControlChannel
from llmd.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from llmd.engine.scheduler import Scheduler
from llmd.model import checkpoint
from llmd.model.captured_sizes import NOTHING_CAPTURED, CapturedSizes, captured_sizes
from llmd.model.checkpoint import load_decoder, load_without_memory
from llmd.model.decoder import Decoder
from llmd.model.kv_cache import allocate_kv_cache
from llmd.model.ledger import MemoryLedger
from llmd.model.spec import load_spec
from llmd.protocol.generation import GenerateRequest
from llmd.worker import rank
from llmd.worker.gpu_runner import GpuRunner
from llmd.worker.rehearsal import NoStream, rehearse
from llmd.worker.stream import Download, Stream
from llmd_kernels import dispatch
from llmd_kernels.compile_ahead import compiling_ahead
from llmd_kernels.paged_attention import triton_ops
from tests.kernels.proof.compiler import absent_gpu
from tests.model import quantized_checkpoints, reference_models
from tests.model.mxfp4_checkpoints import save_with_mxfp4
from tests.worker.engine import BLOCK_SIZE, Engine, generate_request

MAX_MODEL_LEN = 400
MAX_NUM_SEQS = 36
MAX_NUM_TOKENS = 300
MAX_CAPTURED_TOKENS = 128
NUM_BLOCKS = 1500


@dataclass
class Kernels:
    """What would have been compiled: each kernel with all that Triton compiles it for."""

    wanted: set[str] = field(default_factory=set)

    def hook(self, *, key: str, fn: Any, **_: Any) -> bool:
        self.wanted.add(f"{fn.name} {key}")
        return True  # neither compile nor launch


@contextmanager
def absent_device() -> Iterator[Kernels]:
    """CPU tensors are those of a GPU for which nothing was compiled yet and nothing will be."""
    kernels = Kernels()
    with pytest.MonkeyPatch.context() as patch, absent_gpu("sm_90"), knobs.runtime.scope():
        patch.setattr(driver.active, "get_current_device", lambda: id(kernels))
        patch.setattr(triton_ops, "processors", lambda _: triton_ops.Processors("sm_90", 132))
        patch.setattr(dispatch, "TRITON_DEVICES", {"cpu"})
        # as on a GPU, quantised weights stay so
        patch.setattr(checkpoint, "has_quantized_kernels", lambda **_: True)
        knobs.runtime.jit_cache_hook = kernels.hook
        yield kernels


class HostStream:
    """Copies at once, and captures nothing."""

    def upload(self, numbers: npt.NDArray[np.int32], target: Tensor) -> None:
        target[: len(numbers)].copy_(torch.from_numpy(numbers))

    def download(self, source: Tensor) -> Download:
        return Arrived(torch.zeros_like(source))

    def capture(self, work: Any) -> Any:
        return work


@dataclass
class Arrived:
    numbers: Tensor

    def wait(self) -> Tensor:
        return self.numbers


def gpu_runner(model: Decoder, stream: Stream, *, kv_dtype: torch.dtype, with_graphs: bool) -> GpuRunner:
    spec = replace(model.spec, layers=model.spec.layers[: model.num_layers])
    kv = allocate_kv_cache(spec, num_blocks=NUM_BLOCKS + 1, block_size=BLOCK_SIZE, dtype=kv_dtype, device=model.device)
    captured = captured_sizes(
        model.spec, max_num_seqs=MAX_NUM_SEQS, max_num_tokens=MAX_CAPTURED_TOKENS, dtype_bytes=model.dtype.itemsize
    )
    return GpuRunner(
        model,
        kv,
        stream,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_tokens=MAX_NUM_TOKENS,
        device=model.device,
        captured=captured if with_graphs else NOTHING_CAPTURED,
    )


def rehearsed(folder: Path, *, dtype: torch.dtype, **options: Any) -> set[str]:
    with absent_device() as kernels, compiling_ahead(num_threads=1):
        model = load_without_memory(folder, dtype=dtype, max_model_len=MAX_MODEL_LEN).with_unlike_layers()
        runner = gpu_runner(model, NoStream(), **options)
        for _ in rehearse(
            runner, max_num_seqs=MAX_NUM_SEQS, max_num_tokens=MAX_NUM_TOKENS, max_model_len=MAX_MODEL_LEN
        ):
            pass
    return kernels.wanted


def launched(folder: Path, requests: list[list[GenerateRequest]], *, dtype: torch.dtype, **options: Any) -> set[str]:
    """By real steps of a real model, all requests of a list at once; what they compute is never seen."""
    with absent_device() as kernels:
        model = load_decoder(folder, dtype=dtype, device=torch.device("cpu"), max_model_len=MAX_MODEL_LEN)
        scheduler = Scheduler(
            CacheConfig(block_size=BLOCK_SIZE, prefix_caching=False),
            SchedulerConfig(max_num_batched_tokens=MAX_NUM_TOKENS, max_num_seqs=MAX_NUM_SEQS),
            num_blocks=NUM_BLOCKS,
            max_model_len=MAX_MODEL_LEN,
        )
        engine = Engine(scheduler, gpu_runner(model, HostStream(), **options))
        for batch in requests:
            engine.run(batch)
    return kernels.wanted


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 0.0, "num_logprobs": 3, "num_prompt_logprobs": 2},
    {"temperature": 0.0, "num_logprobs": 20, "num_prompt_logprobs": 0},
    {"temperature": 0.9, "top_k": 5},
    {"temperature": 1.1, "top_p": 0.7, "min_p": 0.01},
    {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "top_p": 0.5},
    {"temperature": 0.0, "logit_bias": {7: 3.0, 8: -100.0}},
    {"temperature": 1.0, "min_tokens": 3, "stop_token_ids": (5, 6, 7)},
]


def batches(*, seed: int, number: int) -> list[list[GenerateRequest]]:
    """Requests of all sizes: alone and many at once, drawn alike or each in its own way."""
    dice = random.Random(seed)
    batches = []
    for batch in range(number):
        ways = dice.choice([[{"temperature": 0.0}], [dice.choice(SAMPLINGS)], SAMPLINGS])
        size = dice.choice([1, 2, dice.randint(3, 18), MAX_NUM_SEQS])
        batches.append(
            [
                generate_request(
                    1000 * batch + index,
                    [dice.randrange(60) for _ in range(dice.choice([1, 2, 17, dice.randint(1, 390)]))],
                    max_tokens=dice.randint(1, 5),
                    **dice.choice(ways),
                )
                for index in range(size)
            ]
        )
    return batches


def assert_all_found(
    folder: Path,
    *,
    seed: int,
    number: int = 6,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype = torch.bfloat16,
    with_graphs: bool = True,
) -> set[str]:
    options: dict[str, Any] = {"dtype": dtype, "kv_dtype": kv_dtype, "with_graphs": with_graphs}
    found = rehearsed(folder, **options)
    needed = launched(folder, batches(seed=seed, number=number), **options)
    assert not sorted(needed - found)
    return needed


@pytest.mark.parametrize("with_graphs", [True, False], ids=["graphs", "eager"])
def test_steps_of_all_sizes(tmp_path: Path, with_graphs: bool) -> None:
    folder = make_tiny_model(tmp_path, num_layers=3)
    needed = assert_all_found(folder, seed=1, number=20, with_graphs=with_graphs)
    names = {kernel.split()[0] for kernel in needed}
    assert {"attend", "linear_draw_kernel", "choose_kernel", "adjust_kernel", "top_of_chunks_kernel"} <= names
    # tiles of 16 to 128 tokens
    assert sum(kernel.startswith("linear_kernel") for kernel in needed) >= 8


@pytest.mark.parametrize("case", ["gemma2", "gpt-oss", "deepseek v3", "qwen3 moe"])
def test_families(case: str, tmp_path: Path) -> None:
    model_type, fields = reference_models.CASES[case]
    model = reference_models.make_reference(model_type, fields | {"max_position_embeddings": MAX_MODEL_LEN})
    folder = reference_models.save_reference(model, tmp_path)
    assert_all_found(folder, seed=2, dtype=torch.float16, kv_dtype=torch.float16)


@pytest.mark.parametrize(
    "case", ["awq", "gptq, 4 bits, shuffled", "int-quantized", "float-quantized, one scale", "fp8, blocks"]
)
def test_quantised_weights(case: str, tmp_path: Path) -> None:
    plain = make_tiny_model(tmp_path / "plain")
    quantized_checkpoints.write_quantized(plain, tmp_path / "quantised", quantized_checkpoints.CASES[case])
    needed = assert_all_found(tmp_path / "quantised", seed=3, number=3)
    assert any(kernel.startswith("quantized_linear_kernel") for kernel in needed)


@pytest.mark.parametrize("case", ["awq", "int-quantized", "fp8, blocks", "fp8, one scale"])
def test_quantised_experts(case: str, tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2,
        "max_position_embeddings": MAX_MODEL_LEN,
    }  # fmt: skip
    model = reference_models.make_reference("mixtral", reference_models.EXPERTS_5 | sizes)
    plain = reference_models.save_reference(model, tmp_path / "plain")
    quantized = quantized_checkpoints.CASES[case]
    if case == "int-quantized":
        quantized = replace(quantized, config=quantized.config | {"ignore": ["lm_head", r"re:.*\.gate$"]})
    quantized_checkpoints.write_quantized(plain, tmp_path / "quantised", quantized)
    needed = assert_all_found(tmp_path / "quantised", seed=5, number=3)
    assert kinds_of_stacks(needed) == {{"awq": "int4", "int-quantized": "int8"}.get(case, "float8")}


def test_mxfp4_experts(tmp_path: Path) -> None:
    model_type, fields = reference_models.CASES["gpt-oss"]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": MAX_MODEL_LEN}
    folder = save_with_mxfp4(reference_models.make_reference(model_type, fields | sizes), tmp_path)
    assert kinds_of_stacks(assert_all_found(folder, seed=6, number=3)) == {"float4"}


def kinds_of_stacks(kernels: set[str]) -> set[str]:
    """Which kinds of weights the experts' kernels were compiled for."""
    texts = [kernel for kernel in kernels if kernel.startswith(("gate_up_kernel", "down_kernel"))]
    return {kind for kind in ("numbers", "int4", "int8", "float8", "float4") for text in texts if f"'{kind}'" in text}


def test_a_float8_cache(tmp_path: Path) -> None:
    assert_all_found(make_tiny_model(tmp_path), seed=4, kv_dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("case", ["gemma2", "gpt-oss", "deepseek v3", "qwen3 moe"])
def test_kernels_are_given_tensors_of_one_device(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that was left on the host is one that interpreted kernels can read, and a GPU cannot."""
    model_type, fields = reference_models.CASES[case]
    model = reference_models.make_reference(model_type, fields | {"max_position_embeddings": MAX_MODEL_LEN})
    folder = reference_models.save_reference(model, tmp_path)
    devices: set[str] = set()
    with absent_device(), compiling_ahead(num_threads=1):
        launch = JITFunction.run

        def watched(kernel: Any, *args: Any, **options: Any) -> Any:
            devices.update(value.device.type for value in (*args, *options.values()) if isinstance(value, Tensor))
            return launch(kernel, *args, **options)

        monkeypatch.setattr(JITFunction, "run", watched)
        # not `load_without_memory`, for which "meta" is where all tensors are that nobody has a device for
        decoder = load_decoder(
            folder, dtype=torch.bfloat16, device=torch.device("meta"), max_model_len=MAX_MODEL_LEN, dummy=True
        )
        runner = gpu_runner(decoder, NoStream(), kv_dtype=torch.bfloat16, with_graphs=True)
        for _ in rehearse(
            runner, max_num_seqs=MAX_NUM_SEQS, max_num_tokens=MAX_NUM_TOKENS, max_model_len=MAX_MODEL_LEN
        ):
            pass
        monkeypatch.undo()
    assert devices == {"meta"}


def test_layers_that_are_alike_are_gone_through_once(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, num_layers=9)
    assert load_without_memory(folder, dtype=torch.bfloat16, max_model_len=64).with_unlike_layers().num_layers == 2


def test_a_rank_rehearses_its_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does beside loading: an error there would only be logged."""
    folder = make_tiny_model(tmp_path / "model")
    config = WorkerConfig(
        model=ModelConfig(served_names=("tiny",), cache_dir=str(tmp_path)),
        model_dir=str(folder),
        cache=CacheConfig(block_size=BLOCK_SIZE),
        scheduler=SchedulerConfig(max_num_batched_tokens=MAX_NUM_TOKENS, max_num_seqs=MAX_NUM_SEQS),
        rank=0,
        engine_fd=-1,
    )
    memory = MemoryLedger(
        weights=0, activations=0, kv_cache=0, free=0, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN, wanted_model_len=500,
        captured=CapturedSizes(rows=(1, 2, 4, 8, 16, 24, 32, 40), tokens=(16, 32, 48, 64, 80, 96, 112, 128)),
    )  # fmt: skip
    monkeypatch.setattr(rank, "keep_compiled_kernels", lambda _parent, _device: tmp_path / "kernels")
    ours, theirs = socket.socketpair()
    dtype = torch.bfloat16
    with ours, theirs, absent_device() as kernels:
        for _ in range(2):
            with rank.compiling_kernels(config, ControlChannel(ours), load_spec(folder), memory, dtype, dtype):
                pass
    assert kernels.wanted == rehearsed(folder, dtype=dtype, kv_dtype=dtype, with_graphs=True)
    assert len(list((tmp_path / "kernels" / "complete").iterdir())) == 1
