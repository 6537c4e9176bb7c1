"""Stage: what the proofs say without a GPU, on the GPU; and what can only be known on one."""

import functools
import os
import shutil
import subprocess
import sys
import time
from multiprocessing.pool import Pool

import torch
from torch import Tensor

from bench.gpu.compiling import Work, compile_all, proof_of
from bench.gpu.contexts import random_cache, random_on
from bench.gpu.launches import launch_linear, with_tile
from bench.gpu.launching import launched_on
from bench.gpu.machine import Machine
from bench.gpu.results import Recorder, Values
from llmd_kernels import AttentionBatch, linear, paged_attention
from llmd_kernels.linear import triton_ops as linear_ops
from llmd_kernels.linear.tiles import Tile, candidates, find_device, with_pointers
from llmd_kernels.paged_attention import torch_ops as attention_torch
from tests.kernels.proof.checks import TOLERANCES, Proof, check_case, check_numbers, check_rows, sets_of
from tests.kernels.proof.registry import PROOFS

# What a proof gives to a kernel can be copied to a device, unless it holds addresses.
MOVABLE = tuple(proof for proof in PROOFS if not any(case.in_turns for case in proof.cases))
# Columns of a matrix instruction that one row's bits must not depend on: all that tiles have.
COLUMNS = (16, 32, 64, 128, 256)
# Errors of kernels, not those of calls that torch makes to find out what there is.
_SANITIZER_FLAGS = ("--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")
# Seconds; less than a row may take.
_SANITIZER_TIMEOUT = 35.0


def measure(machine: Machine, recorder: Recorder, pool: Pool) -> None:
    recorder.row("compiling", lambda: _compile(machine, pool), is_limited=False)
    with machine.running():
        wanted = machine.sizes.proofs
        for proof in (proof for proof in MOVABLE if wanted is None or proof.name in wanted):
            recorder.row(f"{proof.name}, cases", lambda proof=proof: _check_cases(machine, proof))
            if proof.rows:
                recorder.row(f"{proof.name}, rows", lambda proof=proof: _check_rows(machine, proof))
        recorder.row("all_reduce_add_rms_norm, ranks of one launch", lambda: _check_ranks(machine))
        recorder.row("linear, shipped tiles", lambda: _check_linear(machine))
        recorder.row("paged_attention, shipped tiles", lambda: _check_attention(machine))
        recorder.row("linear, any number of tokens", lambda: _check_tokens(machine))
        recorder.row("linear, any number of columns", lambda: _check_columns(machine))
        recorder.row("linear, any tile", lambda: _check_tiles(machine))
        recorder.row("paged_attention, any chunks", lambda: _check_chunks(machine))
        recorder.row("paged_attention, last to arrive", lambda: _stress(machine))
    recorder.row("compute-sanitizer", lambda: _sanitize(machine))


def _compile(machine: Machine, pool: Pool) -> Values:
    """What cases and rows launch, and `linear` at all its sizes."""
    limit = machine.sizes.cases_per_proof
    works: list[Work] = []
    for proof in PROOFS[: None if limit is None else 1]:
        works += [functools.partial(run_case, proof.name, index) for index in range(len(proof.cases[:limit]))]
        works += [functools.partial(run_rows, proof.name, index) for index in range(len(proof.rows[:limit]))]
    if limit is None:
        works += [
            functools.partial(launch_linear, shape, num_tokens)
            for shape in _small_linears(machine)
            for num_tokens in machine.sizes.invariant_tokens
        ]
        works += [
            functools.partial(launch_linear, machine.sizes.model.linears["o"], COLUMNS[-1], tile)
            for tile in (*map(tile_of, COLUMNS), *_large_tiles(machine))
        ]
    return compile_all(pool, machine, works)


def run_case(name: str, index: int) -> None:
    proof = proof_of(name)
    proof.operation(**proof.cases[index].arguments)


def run_rows(name: str, index: int) -> None:
    rows = proof_of(name).rows[index]
    for ids in sets_of(rows):
        rows.run(ids)


def tile_of(columns: int) -> Tile:
    """Few stages, so that even the widest fits into shared memory."""
    return Tile(64, columns, 4, 3, splits=True)


def _large_tiles(machine: Machine) -> list[Tile]:
    """All that can be chosen for many tokens on this device, whatever its weights."""
    return with_pointers(candidates(find_device(machine.arch), has_spans=True))


def _check_cases(machine: Machine, proof: Proof) -> Values:
    """Against the reference in float64. A rehearsal leaves out cases without rows, which launch nothing."""
    limit = machine.sizes.cases_per_proof
    cases = proof.cases if limit is None else proof.cases[1 : 1 + limit]
    largest, failures = 0.0, []
    for case in cases:
        try:
            with launched_on(machine.device):
                largest = max(largest, check_numbers(proof, case))
        except AssertionError as failure:
            failures.append(f"{case.name}: {' '.join(str(failure).split())}")
    if failures:
        raise AssertionError(f"{len(failures)} of {len(cases)} cases: {'; '.join(failures)}")
    return {"cases": len(cases), "largest error": largest}


def _check_rows(machine: Machine, proof: Proof) -> Values:
    rows = proof.rows if machine.sizes.cases_per_proof is None else proof.rows[:1]
    for one in rows:
        check_rows(one, functools.partial(launched_on, machine.device))
    return {"sets of rows": len(rows), "bitwise": True}


def _check_ranks(machine: Machine) -> Values:
    """All ranks in one launch, in the device's own memory."""
    proof = proof_of("all_reduce_add_rms_norm")
    if machine.device.type == "cpu":
        return {"cases": 1, "largest error": check_case(proof, proof.cases[1]).error}
    largest = 0.0
    for case in proof.cases:
        given = {
            name: value.to(machine.device) if isinstance(value, Tensor) else value
            for name, value in case.arguments.items()
        }
        exact = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
        for result, truth in zip(proof.operation(**given), proof.reference(**exact), strict=True):
            if truth.numel():
                largest = max(largest, _error(result, truth))
    return {"cases": len(proof.cases), "largest error": largest}


def _check_linear(machine: Machine) -> Values:
    """The public function on the device's own tensors against float64."""
    errors = []
    for num_inputs, num_outputs in _small_linears(machine):
        for num_tokens in machine.sizes.invariant_tokens[:: len(machine.sizes.invariant_tokens) // 3]:
            x, weight = _operands(machine, num_tokens, num_inputs, num_outputs)
            errors.append(_error(linear(x, weight), x.double() @ weight.double().t()))
    return {"products": len(errors), "largest error": max(errors)}


def _check_attention(machine: Machine) -> Values:
    """Likewise, a step of prompts and decoding sequences, with the tiles that ship for this device.

    Against PyTorch's operators in float64: the proofs' reference, a loop, would take minutes for heads of a real model.
    """
    longest = machine.sizes.prefill[0]
    lens = [longest, longest - 1, longest // 2, 1]
    contexts = random_cache(machine, lens, seed=3)
    step = contexts.step([longest // 3, 1, longest // 2, 1])
    result = paged_attention(*step, scale=contexts.scale)
    q, k_cache, v_cache = (tensor.double().cpu() for tensor in step[:3])
    batch = step[3]
    there = AttentionBatch(batch.query_starts.cpu(), batch.kv_lens.cpu(), batch.block_tables.cpu(), batch.block_size)
    expected = attention_torch.paged_attention(q, k_cache, v_cache, there, scale=contexts.scale)
    return {"queries": len(q), "largest error": _error(result.cpu(), expected)}


def _error(result: Tensor, expected: Tensor) -> float:
    """The largest, relative to 1 + |expected|. Raises AssertionError beyond what the proofs allow."""
    tolerance = TOLERANCES[result.dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    return ((result.double() - expected).abs() / (1 + expected.abs())).max().item()


def _check_tokens(machine: Machine) -> Values:
    """`linear` of a row at every number of tokens: tiles, splits of K and columns of the matrix units all change."""
    differing = 0
    for num_inputs, num_outputs in _small_linears(machine):
        x, weight = _operands(machine, machine.sizes.invariant_tokens[-1], num_inputs, num_outputs)
        whole = linear(x, weight)
        for num_tokens in machine.sizes.invariant_tokens:
            differing += _num_differing(linear(x[:num_tokens], weight), whole[:num_tokens])
            # The last rows stand at other places of a tile than they do among all.
            differing += _num_differing(linear(x[-num_tokens:], weight), whole[-num_tokens:])
    assert not differing, f"{differing} numbers differ"
    return {"matrices": len(_small_linears(machine)), "numbers of tokens": len(machine.sizes.invariant_tokens)}


def _check_columns(machine: Machine) -> Values:
    """The one thing that the design assumes of the hardware: a column's sum does not depend on how many there are."""
    num_inputs, num_outputs = machine.sizes.model.linears["o"]
    num_tokens = min(COLUMNS[-1], machine.sizes.invariant_tokens[-1])
    x, weight = _operands(machine, num_tokens, num_inputs, num_outputs)
    results = {}
    for columns in COLUMNS:
        with with_tile(tile_of(columns)):
            results[columns] = linear(x, weight)
    differing = {columns: _num_differing(result, results[COLUMNS[0]]) for columns, result in results.items()}
    wrong = [str(columns) for columns, number in differing.items() if number]
    assert not wrong, f"not as with {COLUMNS[0]} columns: {', '.join(wrong)}; numbers that differ: {differing}"
    return {"columns": ", ".join(map(str, COLUMNS)), "bitwise": True}


def _check_tiles(machine: Machine) -> Values:
    """Likewise, whichever of the tiles for many tokens is chosen: the bits that few tokens have."""
    num_tokens = min(COLUMNS[-1], machine.sizes.invariant_tokens[-1])
    x, weight = _operands(machine, num_tokens, *machine.sizes.model.linears["o"])
    expected = torch.cat([linear(rows, weight) for rows in x.split(linear_ops.MAX_SPLIT_TOKENS)])
    differing = {}
    for tile in _large_tiles(machine)[: machine.sizes.sweep_configurations]:
        with with_tile(tile):
            differing[tile] = _num_differing(linear(x, weight), expected)
    wrong = [f"{tile}: {number}" for tile, number in differing.items() if number]
    assert not wrong, f"numbers that differ: {'; '.join(wrong)}"
    return {"tiles": len(differing), "bitwise": True}


def _check_chunks(machine: Machine) -> Values:
    """A prompt at once, in chunks, token by token, alone and among others: the bits of its last query."""
    length = machine.sizes.prefill[0]
    cache = random_cache(machine, [length, length // 2, length], seed=1)
    whole = cache.attend([length, 1, 0])[:length]
    differing = 0
    for chunk in (length // 2, 7, 1):
        queries = cache.q[length - chunk : length]
        alone = cache.attend([chunk, 0, 0], q=queries)[:chunk]
        differing += _num_differing(alone, whole[length - chunk :])
    assert not differing, f"{differing} numbers differ"
    return {"context": length, "bitwise": True}


def _stress(machine: Machine) -> Values:
    """Many launches in which several programs hand their parts to the last of them to arrive: always the same bits."""
    cache = random_cache(machine, [8 * machine.sizes.prefill[0]], seed=2)
    decode = cache.step([1], q=cache.q[-1:])
    expected = paged_attention(*decode, scale=cache.scale)
    differing = torch.zeros((), dtype=torch.int64, device=machine.device)
    started = time.perf_counter()
    launches = 0
    while launches < machine.sizes.stress_launches:
        differing += (paged_attention(*decode, scale=cache.scale) != expected).sum()
        launches += 1
        # The host runs ahead of the device; look at the clock when it has waited.
        if launches % 1000 == 0:
            machine.synchronize()
            if time.perf_counter() - started > machine.sizes.stress_seconds:
                break
    assert not differing.item(), f"{differing.item()} numbers differ in {launches} launches"
    return {"launches": launches, "bitwise": True}


def _sanitize(machine: Machine) -> Values:
    """Out-of-bounds accesses on the device, in a small program, where the tool is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"tool": "none here"}
    found = subprocess.run(
        [tool, *_SANITIZER_FLAGS, sys.executable, "-m", "bench.gpu.sanitized", machine.device.type],
        # The caching allocator hands out parts of large blocks: an access beyond a tensor would still be within one.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=_SANITIZER_TIMEOUT,
    )
    if found.returncode:
        raise RuntimeError(f"status {found.returncode}: {(found.stdout + found.stderr)[-2000:]}")
    return {"tool": "memcheck", "clean": True}


def _small_linears(machine: Machine) -> list[tuple[int, int]]:
    """Without the head, whose results for the most tokens would be a gigabyte."""
    return [shape for name, shape in machine.sizes.model.linears.items() if name != "lm_head"]


def _operands(machine: Machine, num_tokens: int, num_inputs: int, num_outputs: int) -> tuple[Tensor, Tensor]:
    random = random_on(machine, seed=1)
    return random(num_tokens, num_inputs), random(num_outputs, num_inputs) / num_inputs**0.5


def _num_differing(result: Tensor, expected: Tensor) -> int:
    return int((result != expected).sum().item())
