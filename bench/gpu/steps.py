"""Stage: a whole model's steps in this process, without HTTP: the same bits however they are run, and their time."""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch

from bench.gpu.compiling import Work, compile_all, shipped
from bench.gpu.decoding import LoadedModel, WatchedStream, decode_plans, load_model, run_steps
from bench.gpu.kernels import read_peaks
from bench.gpu.launches import launch_linear
from bench.gpu.limits import Limits, Peaks
from bench.gpu.machine import Machine
from bench.gpu.results import Recorder, Values
from llmd.protocol.generation import GenerateRequest
from tests.worker.engine import Answer, generate_request

# How the requests that are compared draw their tokens, by turns.
SAMPLINGS: tuple[Mapping[str, Any], ...] = (
    {"temperature": 0.0, "num_logprobs": 3},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 8, "num_logprobs": 0},
    {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.1, "seed": 9},
)
# Configurations of the proofs that the model's steps launch: those of a proof whose names match.
SHIPPED = {
    "sample_on_device": r"float32 128256 .*",
    "linear_draw": r"bfloat16 \d+×4096 → 128256",
    "paged_attention": r"work list|16/16 bits, head size 128, block size 16",
    "rope_kv_write": r"Llama-3.1-8B bfloat16",
    "step_inputs": r"256 rows",
    "rms_norm": r"bfloat16 4096",
    "add_rms_norm": r"bfloat16 4096",
    "gated_mul": r"silu bfloat16 14336",
}
# Steps before those that are timed: one brings the sequences, one runs launch by launch, one is captured.
_FIRST_STEPS = 4


def measure(machine: Machine, recorder: Recorder, pool: Pool, folder: Path) -> None:
    recorder.row("compiling", lambda: _compile(machine, pool), is_limited=False)
    with tempfile.TemporaryDirectory() as temporary, machine.running(whole_model=True):
        started = time.perf_counter()
        model = load_model(machine, Path(temporary))
        machine.synchronize()
        seconds = time.perf_counter() - started
        recorder.row("random weights and KV cache", lambda: {"s": seconds, "blocks": model.num_blocks})
        for num_seqs in machine.sizes.steps.buckets:
            recorder.row(f"decode step, {num_seqs} at once", lambda num_seqs=num_seqs: _time(model, num_seqs, folder))
        same = SameTokens(model)
        recorder.row("graphs as launches one by one", lambda: same.compare(with_graphs=False))
        recorder.row("alone as in company", lambda: same.compare(in_company=True))
        recorder.row("whole prompts as in chunks", lambda: same.compare(in_company=True, in_chunks=True))
        for num_seqs, chunk in machine.sizes.steps.mixed:
            for how in ("", ", launched one by one"):
                time_mixed = functools.partial(_time_mixed, model, num_seqs, chunk, with_graphs=not how)
                recorder.row(f"mixed step, {num_seqs} decode beside {chunk} of a prompt{how}", time_mixed)


def _compile(machine: Machine, pool: Pool) -> Values:
    """Nearly all that steps launch; the rest is small and compiled as it comes."""
    works: list[Work] = [
        functools.partial(launch_linear, shape, num_tokens)
        for shape in machine.sizes.model.linears.values()
        for num_tokens in (
            *machine.sizes.steps.buckets,
            *machine.sizes.steps.prompts,
            *map(sum, machine.sizes.steps.mixed),
        )
    ]
    works += shipped(SHIPPED, machine.arch)
    return compile_all(pool, machine, works[: machine.sizes.sweep_configurations])


def _time(model: LoadedModel, num_seqs: int, folder: Path) -> Values:
    """Of one step: all of it while the host launches ahead, its graph alone, and what the host does for it."""
    machine = model.machine
    values = _time_steps(model, num_seqs)
    step = values["us"] / 1e6
    values["tok/s"] = num_seqs / step
    peaks = read_peaks(folder)
    if peaks is not None:
        limit = Limits(Peaks(*peaks), machine.sizes.model).decode_step(num_seqs, machine.sizes.step_context)
        values |= {"limit us": limit * 1e6, "of limit": limit / step}
    return values


def _time_mixed(model: LoadedModel, num_seqs: int, chunk: int, *, with_graphs: bool) -> Values:
    """Of one step that computes part of a prompt beside those that decode."""
    values = _time_steps(model, num_seqs, chunk=chunk, with_graphs=with_graphs)
    return {**values, "tok/s": (num_seqs + chunk) / (values["us"] / 1e6)}


def _time_steps(model: LoadedModel, num_seqs: int, *, chunk: int = 0, with_graphs: bool = True) -> dict[str, float]:
    machine, sizes = model.machine, model.machine.sizes.steps
    stream = WatchedStream(machine.stream())
    runner = model.runner(stream, max_num_tokens=max(sizes.buckets) + chunk, with_graphs=with_graphs)
    num_read = sizes.num_steps // 2
    num_steps = _FIRST_STEPS + sizes.num_steps + num_read
    *plans, end = decode_plans(model, num_seqs=num_seqs, num_steps=num_steps, chunk=chunk)
    run_steps(runner, plans[:_FIRST_STEPS])
    machine.synchronize()

    launches: list[float] = []
    timed = plans[_FIRST_STEPS:][: sizes.num_steps]
    step = machine.elapsed(lambda: launches.extend(run_steps(runner, timed))) / len(timed)
    reads = [_read(machine, runner.launch(plan).result) for plan in plans[-num_read:]]
    runner.launch(end)

    @torch.inference_mode()
    def replay() -> None:
        for _ in range(sizes.num_steps):
            stream.graphs[-1]()

    launch, read = statistics.median(launches), statistics.median(reads)
    values = {"us": step * 1e6, "host us": (launch + read) * 1e6, "launch us": launch * 1e6}
    if with_graphs:
        graph = machine.elapsed(replay) / sizes.num_steps
        values |= {"graph us": graph * 1e6, "idle us": max(0.0, step - graph) * 1e6}
    return values


def _read(machine: Machine, result: Callable[[], object]) -> float:
    """Seconds that it takes to make a result of what has arrived."""
    machine.synchronize()
    started = time.perf_counter()
    result()
    return time.perf_counter() - started


class SameTokens:
    """Requests whose answers must have the same bits in whatever way they are run (contract C3)."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._sizes = model.machine.sizes.steps

    def compare(self, *, with_graphs: bool = True, in_company: bool = False, in_chunks: bool = False) -> Values:
        """Each alone, its prompt at once, with graphs; and like this."""
        sizes = self._sizes
        engine = self._model.engine(
            max_num_tokens=sizes.chunk if in_chunks else sizes.max_num_tokens, with_graphs=with_graphs
        )
        targets = list(self._targets())
        batches = [[*self._company(), *targets]] if in_company else [[target] for target in targets]
        found: dict[int, Answer] = {}
        for batch in batches:
            found |= engine.run(batch)
        expected = self._expected
        wrong = [
            target.request_id
            for target in targets
            if (found[target.request_id].token_ids, found[target.request_id].logprobs)
            != (expected[target.request_id].token_ids, expected[target.request_id].logprobs)
        ]
        assert not wrong, f"answers {wrong} of {len(targets)} differ: {self._difference(found, expected, wrong[0])}"
        return {
            "requests": len(targets),
            "at once": len(batches[0]),
            "tokens": sum(len(expected[target.request_id].token_ids) for target in targets),
            "bitwise": True,
        }

    @functools.cached_property
    def _expected(self) -> dict[int, Answer]:
        engine = self._model.engine(max_num_tokens=self._sizes.max_num_tokens)
        answers: dict[int, Answer] = {}
        for target in self._targets():
            answers |= engine.run([target])
        return answers

    def _difference(self, found: dict[int, Answer], expected: dict[int, Answer], request_id: int) -> str:
        pairs = zip(found[request_id].token_ids, expected[request_id].token_ids, strict=False)
        places = [place for place, (one, other) in enumerate(pairs) if one != other]
        return f"first of request {request_id} at token {places[0]}" if places else "only log-probabilities"

    def _targets(self) -> Iterator[GenerateRequest]:
        for index, length in enumerate(self._sizes.prompts):
            sampling = SAMPLINGS[index % len(SAMPLINGS)]
            yield generate_request(index, _prompt(length, index), max_tokens=self._sizes.num_answered, **sampling)

    def _company(self) -> Iterator[GenerateRequest]:
        for index in range(len(self._sizes.prompts), self._sizes.num_together):
            length = 1 + 31 * index % self._sizes.prompts[0]
            yield generate_request(index, _prompt(length, index), max_tokens=1 + index % 7, temperature=0.0)


def _prompt(length: int, seed: int) -> list[int]:
    return [(seed * 31 + 7 * i * i + 3 * i) % 251 for i in range(length)]
