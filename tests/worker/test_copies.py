"""At most one copy to the device and one back for each step, whatever the step, the model and its rows ask for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from llmd.model.captured_sizes import captured_sizes
from llmd.model.checkpoint import load_without_memory
from llmd.model.decoder import Decoder
from llmd.model.kv_cache import allocate_kv_cache
from llmd.protocol.generation import GenerateRequest
from llmd.protocol.steps import StepPlan
from llmd.worker.gpu_runner import GpuRunner
from llmd.worker.runner import PendingStep
from tests.model.reference_models import DEEPSEEK, GPT_OSS, make_reference, save_reference
from tests.worker.engine import BLOCK_SIZE, Engine, generate_request
from tests.worker.pretended_gpu import MAX_MODEL_LEN, MAX_NUM_SEQS, make_scheduler
from tests.worker.separate_memory import DEVICE, CountingStream, UnseenCopy, no_unseen_copies, separate_memory

NUM_BLOCKS, CHUNK = 100, 64
VOCAB_SIZE = 64
SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
POSITIONS = {"max_position_embeddings": MAX_MODEL_LEN}
# Layers of one kind; with a window and without, with experts; latent attention with experts.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "gpt-oss": ("gpt_oss", GPT_OSS | {"num_local_experts": 4}),
    "gpt-oss, MXFP4": ("gpt_oss", GPT_OSS | {"num_local_experts": 4}),
    "deepseek v3": ("deepseek_v3", DEEPSEEK | {"n_group": 4, "topk_group": 2, "num_key_value_heads": 2}),
}
# What rows ask for.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "filters": {"top_k": 5, "top_p": 0.7},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    "biases": {"logit_bias": {7: 3.0, 8: -100.0}, "min_tokens": 2, "stop_token_ids": (5, 6)},
    "logprobs": {"num_logprobs": 3},
    "prompt logprobs": {"num_prompt_logprobs": 2},
    "both": {"num_logprobs": 0, "num_prompt_logprobs": 0, "top_p": 0.5},
}


@dataclass(frozen=True)
class Step:
    """What one step was and copied."""

    num_tokens: list[int]  # of each row
    draws: bool
    num_uploads: int
    num_downloads: int

    @property
    def is_decode(self) -> bool:
        return max(self.num_tokens) == 1

    @property
    def is_mixed(self) -> bool:
        return max(self.num_tokens) > 1 == min(self.num_tokens)


@dataclass
class Watched:
    """A runner whose steps are remembered. Each is launched and read where an unseen copy raises."""

    runner: GpuRunner
    stream: CountingStream
    steps: list[Step] = field(default_factory=list)

    def launch(self, plan: StepPlan) -> PendingStep:
        before = replace(self.stream)
        with no_unseen_copies():
            pending = self.runner.launch(plan)
            pending.result()
        if plan.sequence_ids:
            self.steps.append(
                Step(
                    plan.num_tokens,
                    any(plan.samples),
                    self.stream.num_uploads - before.num_uploads,
                    self.stream.num_downloads - before.num_downloads,
                )
            )
        return pending

    def prepare(self) -> bool:
        with no_unseen_copies():
            return self.runner.prepare()


@pytest.fixture(scope="module", params=MODELS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    model_type, fields = MODELS[request.param]
    changes = {"quantization_config": {"quant_method": "mxfp4"}} if "MXFP4" in request.param else {}
    model = make_reference(model_type, SIZES | fields | POSITIONS)
    folder = save_reference(model, tmp_path_factory.mktemp("models"), **changes)
    return load_without_memory(folder, dtype=torch.bfloat16, max_model_len=MAX_MODEL_LEN)


@pytest.fixture
def watched(decoder: Decoder) -> Iterator[Watched]:
    with separate_memory():
        stream = CountingStream()
        kv = allocate_kv_cache(
            decoder.spec, num_blocks=NUM_BLOCKS + 1, block_size=BLOCK_SIZE, dtype=decoder.dtype, device=DEVICE
        )
        runner = GpuRunner(
            decoder,
            kv,
            stream,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_tokens=CHUNK,
            device=DEVICE,
            captured=captured_sizes(
                decoder.spec, max_num_seqs=MAX_NUM_SEQS, max_num_tokens=CHUNK, dtype_bytes=decoder.dtype.itemsize
            ),
        )
        yield Watched(runner, stream)


def requests(sampling: dict[str, Any], *prompt_lens: int) -> list[GenerateRequest]:
    return [
        generate_request(length, [i % VOCAB_SIZE for i in range(length)], max_tokens=4, **sampling)
        for length in prompt_lens
    ]


@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_one_copy_each_way(watched: Watched, way: str) -> None:
    engine = Engine(make_scheduler(NUM_BLOCKS, CHUNK), watched)
    # some that decode beside the rest of a prompt; then one that alone takes more than a step
    engine.run(requests(WAYS[way], 3, 60, 50))
    engine.run(requests(WAYS[way], 100))
    for kind in ("is_decode", "is_mixed", "draws"):
        assert {getattr(step, kind) for step in watched.steps} == {True, False}
    for step in watched.steps:
        assert step.num_uploads == 1
        assert step.num_downloads == int(step.draws or "num_prompt_logprobs" in WAYS[way])


def test_all_ways_at_once(watched: Watched) -> None:
    engine = Engine(make_scheduler(NUM_BLOCKS, CHUNK), watched)
    while engine.runner.prepare():
        pass
    engine.run(request for i, sampling in enumerate(WAYS.values()) for request in requests(sampling, 5 + 7 * i))
    assert {(step.num_uploads, step.num_downloads) for step in watched.steps} == {(1, 1)}


def some_tensor() -> Tensor:
    return torch.zeros(4, 4, dtype=torch.int64, device=DEVICE)


@triton.jit
def copy_kernel(x, y, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(y + places, tl.load(x + places))


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: torch.tensor([1, 2], device=DEVICE),
        lambda x: torch.as_tensor(np.arange(3), device=DEVICE),
        lambda x: x.new_tensor([1, 2]),
        lambda x: torch.tensor([1, 2]).to(DEVICE),
        lambda x: torch.from_numpy(np.arange(3)).to(DEVICE, non_blocking=True),
        lambda x: x[0].copy_(torch.arange(4)),
        lambda x: x[0, 0].copy_(torch.tensor(3)),
        lambda x: x.__setitem__(0, torch.arange(4)),
        lambda x: x.__setitem__([0, 1], 5),
        lambda x: x[[0, 1]],
        lambda x: x[:, np.arange(2)],
        lambda x: x[torch.arange(2)],
        lambda x: x.index_select(0, torch.arange(2)),
        lambda x: x + torch.arange(4),
        lambda x: copy_kernel[(1,)](torch.arange(4), x, BLOCK=4),
    ],
)
def test_an_unseen_copy_is_found(copy: Callable[[Tensor], object]) -> None:
    with separate_memory(), no_unseen_copies(), pytest.raises(UnseenCopy):
        copy(some_tensor())


def test_numbers_that_go_with_a_launch_are_no_copies() -> None:
    with separate_memory(), no_unseen_copies():
        x = some_tensor()
        x[0] = 3
        x[1:, 2] += torch.tensor(2)
        copy_kernel[(1,)](x, x, BLOCK=4)
        assert torch.where(x[x[0]] > 3, x, 0).float().is_meta


def test_a_second_copy_in_a_step_is_found(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = Decoder.hidden
    monkeypatch.setattr(Decoder, "hidden", lambda *args: hidden(*args) + torch.zeros(1))
    with pytest.raises(UnseenCopy):
        Engine(make_scheduler(NUM_BLOCKS, CHUNK), watched).run(requests({}, 3))
