"""The step of a GPU, on CPU tensors: Triton's kernels in the interpreter, graphs recorded and replayed.

It gives the tokens of the CPU's runner, and bitwise the same ones alone, in company, in chunks, preempted, and whether
steps run as graphs or not.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from make_tiny_model import make_tiny_model
from torch import Tensor

from llmd.model import captured_sizes
from llmd.model.decoder import Decoder
from llmd.protocol.generation import SamplingParams
from llmd.protocol.steps import NewSequence, SequenceStep, StepPlan
from llmd.worker import gpu_runner as gpu_runner_module
from llmd.worker.stream import Download
from tests.worker.engine import Answer, generate_request
from tests.worker.pretended_gpu import (
    GpuRun,
    cpu_engine,
    gpu_runner,
    load_for_cpu,
    load_for_gpu,
    pretended_gpu,
    run_on_gpu,
)
from tests.worker.recorder import RecordingStream


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As small as a model can be: the interpreter takes a tenth of a second for a launch."""
    folder = tmp_path_factory.mktemp("models") / "smallest"
    return make_tiny_model(
        folder, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=32, seed=1
    )


@pytest.fixture(scope="module")
def cpu_decoder(model_dir: Path) -> Decoder:
    return load_for_cpu(model_dir, torch.float32)


@pytest.fixture(scope="module")
def gpu_decoder(model_dir: Path) -> Decoder:
    return load_for_gpu(model_dir, torch.float32)


def prompt(length: int, seed: int) -> list[int]:
    return [(seed * 31 + 7 * i * i + 3 * i) % 251 for i in range(length)]


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "num_logprobs": 3, "num_prompt_logprobs": 2},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "seed": 1 << 63, "choice": 5},
    {"temperature": 0.9, "top_k": 5, "seed": 8},
    {"temperature": 1.1, "top_p": 0.7, "min_p": 0.01, "seed": 9},
    {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1, "seed": 4},
    {"temperature": 0.0, "logit_bias": {7: 3.0, 8: -100.0}},
    {"temperature": 1.0, "min_tokens": 3, "stop_token_ids": (5, 6, 7), "seed": 2},
]


def close(entries: list[Any], expected: list[Any]) -> None:
    assert len(entries) == len(expected)
    for entry, other in zip(entries, expected, strict=True):
        assert (entry.token_id, entry.rank, entry.top_ids) == (other.token_id, other.rank, other.top_ids)
        assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert entry.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-4)


def assert_same(run: GpuRun, expected: dict[int, Answer]) -> None:
    """The tokens of a CPU; its log-probabilities but for rounding."""
    for request_id, answer in expected.items():
        assert run.answers[request_id].token_ids == answer.token_ids
        close(run.answers[request_id].logprobs, answer.logprobs)
        close(run.answers[request_id].prompt_logprobs or [], answer.prompt_logprobs or [])


def test_every_way_of_drawing(cpu_decoder: Decoder, gpu_decoder: Decoder) -> None:
    """With prompts in chunks, and decode steps mixed with them."""
    requests = [generate_request(i, prompt(2 + i, i), max_tokens=3, **sampling) for i, sampling in enumerate(SAMPLINGS)]
    run = run_on_gpu(gpu_decoder, requests, chunk=16)
    assert_same(run, cpu_engine(cpu_decoder, chunk=16).run(requests))
    assert run.stream.num_uploads == run.stream.num_downloads == run.scheduler.statistics().num_steps


def test_decode_steps_of_many_sizes(cpu_decoder: Decoder, gpu_decoder: Decoder) -> None:
    """Places are given anew while steps of their last owners are in flight; drawn tokens never come from the host."""
    first, second = (
        [
            generate_request(i, prompt(3 + i, i), max_tokens=10 - 2 * (i % 4), temperature=i % 2, seed=i)
            for i in range(start, start + 4)
        ]
        for start in (0, 4)
    )
    run = run_on_gpu(gpu_decoder, first, second)
    cpu = cpu_engine(cpu_decoder)
    assert_same(run, cpu.run(first) | cpu.run(second))
    # buckets of one, two and four rows, each captured at its second step; one copy to the device a step, one back
    assert run.stream.num_captures == 3
    assert run.stream.num_replays > 6
    assert run.stream.num_uploads == run.stream.num_downloads == run.scheduler.statistics().num_steps


def test_prompts_in_captured_steps(cpu_decoder: Decoder, gpu_decoder: Decoder) -> None:
    """Parts of prompts beside sequences that decode, drawn in all ways: most steps are graphs, of several sizes."""
    requests = [
        generate_request(i, prompt(20 + 5 * i, i), max_tokens=6, **sampling)
        for i, sampling in enumerate(each for each in SAMPLINGS if "num_prompt_logprobs" not in each)
    ]
    run = run_on_gpu(gpu_decoder, requests, chunk=24)
    assert_same(run, cpu_engine(cpu_decoder, chunk=24).run(requests))
    num_steps = run.scheduler.statistics().num_steps
    num_prompt_steps = sum(20 + 5 * i for i in range(len(requests))) // 24
    assert run.stream.num_replays > num_steps - num_prompt_steps
    assert run.stream.num_uploads == run.stream.num_downloads == num_steps
    one_by_one = run_on_gpu(gpu_decoder, requests, chunk=24, with_graphs=False)
    assert one_by_one.answers == run.answers


def test_preempted_sequences_come_again(cpu_decoder: Decoder, gpu_decoder: Decoder) -> None:
    requests = [generate_request(i, prompt(14, i), max_tokens=6, temperature=0.0) for i in range(3)]
    # room for the prompts, not for the answers: the last one has to go, and comes again
    run = run_on_gpu(gpu_decoder, requests, num_blocks=4)
    assert run.scheduler.statistics().num_preemptions > 0
    assert_same(run, cpu_engine(cpu_decoder).run(requests))


def test_no_bit_depends_on_how_a_request_is_run(gpu_decoder: Decoder) -> None:
    """Contract C3, for tokens and log-probabilities."""
    target = generate_request(0, prompt(35, 5), max_tokens=4, temperature=0.8, seed=7, num_logprobs=3)
    company = [generate_request(i, prompt(6 * i, i), max_tokens=3, temperature=0.0) for i in (1, 2, 3)]
    alone = run_on_gpu(gpu_decoder, [target])
    again = generate_request(9, target.prompt_token_ids, max_tokens=4, temperature=0.8, seed=7, num_logprobs=3)
    cached = run_on_gpu(gpu_decoder, [target], [again], prefix_caching=True)
    assert cached.answers[9].num_cached_tokens == 32
    for answer in (
        run_on_gpu(gpu_decoder, [target], with_graphs=False).answers[0],
        run_on_gpu(gpu_decoder, [*company[:2], target, *company[2:]], chunk=24).answers[0],
        cached.answers[9],
    ):
        assert answer.token_ids == alone.answers[0].token_ids
        assert answer.logprobs == alone.answers[0].logprobs
    assert alone.stream.num_replays > 0


def test_graphs_are_made_while_nothing_runs(gpu_decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_sizes, "ROW_SIZES", (1, 2))
    monkeypatch.setattr(captured_sizes, "TOKEN_SIZES", (8,))
    request = generate_request(0, prompt(3, 1), max_tokens=4, temperature=0.0)
    prepared, unprepared = (run_on_gpu(gpu_decoder, [request], num_prepared=n) for n in (10, 0))
    # decode steps of either size with either ending, and others
    assert prepared.stream.num_captures == 5
    assert unprepared.stream.num_captures == 1
    assert prepared.answers[0].token_ids == unprepared.answers[0].token_ids


def test_a_prompt_too_long_for_a_captured_step_is_sent_otherwise(
    gpu_decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = prompt(33, 1)
    requests = [generate_request(i, long, max_tokens=2, temperature=0.0) for i in (0, 1)]
    whole = run_on_gpu(gpu_decoder, requests[:1], requests[1:], prefix_caching=True)
    # all of the second prompt but its last token is cached: that is a decode step with many new numbers
    monkeypatch.setattr(gpu_runner_module, "_CAPTURED_NUMBERS", 100)
    small = run_on_gpu(gpu_decoder, requests[:1], requests[1:], prefix_caching=True)
    assert small.answers[1].num_cached_tokens == 32
    assert small.answers[1].token_ids == whole.answers[1].token_ids == whole.answers[0].token_ids


def plan(step_id: int, *rows: SequenceStep, dropped: list[int] | None = None, new: list[int] | None = None) -> StepPlan:
    """The sequences in `new` have a prompt of five tokens each, another for each id."""
    brought = [
        NewSequence(
            sequence_id=sequence_id,
            token_ids=prompt(5, sequence_id),
            num_prompt_tokens=5,
            sampling=SamplingParams(max_tokens=9, seed=0, temperature=0.0),
        )
        for sequence_id in new or []
    ]
    return StepPlan(
        step_id=step_id,
        dropped=dropped or [],
        new=brought,
        new_block_ids={row.sequence_id: list(row.new_block_ids) for row in rows if row.new_block_ids},
        sequence_ids=[row.sequence_id for row in rows],
        starts=[row.start for row in rows],
        num_tokens=[row.num_tokens for row in rows],
        samples=[row.samples for row in rows],
    )


def test_a_place_and_its_blocks_go_to_another_while_steps_are_in_flight(
    cpu_decoder: Decoder, gpu_decoder: Decoder
) -> None:
    """There is one place. Each plan is launched before the result of the one before it is read."""
    plans = [
        plan(0, SequenceStep(1, 0, 5, [0], samples=True), new=[1]),
        plan(1, SequenceStep(1, 5, 1, (), samples=True)),
        plan(2, SequenceStep(2, 0, 5, [0], samples=True), dropped=[1], new=[2]),
        plan(3, SequenceStep(2, 5, 1, (), samples=True)),
        plan(4, SequenceStep(3, 0, 5, [0], samples=True), dropped=[2], new=[3]),
    ]
    with pretended_gpu():
        runner = gpu_runner(gpu_decoder, RecordingStream(), num_blocks=1, max_num_seqs=1)
        pending, results = [runner.launch(plans[0])], []
        for following in plans[1:]:
            pending.append(runner.launch(following))
            results.append(pending.pop(0).result())
        results.append(pending.pop().result())
    cpu_runner = cpu_engine(cpu_decoder, num_blocks=1).runner
    assert results == [cpu_runner.launch(p).result() for p in plans]


class FailingStream(RecordingStream):
    """Its device fails in the middle of a step; the host finds out when it waits for numbers."""

    def download(self, source: Tensor) -> Download:
        super().download(source)
        return Failed()


class Failed:
    def wait(self) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_what_goes_wrong_on_the_device_is_raised_by_the_result(gpu_decoder: Decoder) -> None:
    """Not by the launch of a later step; see test_serving for how it ends a rank."""
    with pretended_gpu():
        runner = gpu_runner(gpu_decoder, FailingStream(), num_blocks=1)
        pending = runner.launch(plan(0, SequenceStep(1, 0, 5, [0], samples=True), new=[1]))
        with pytest.raises(RuntimeError, match="illegal memory access"):
            pending.result()
