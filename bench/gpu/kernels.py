"""Stage: kernels at the sizes of Llama-3.1-8B and Qwen3-30B-A3B's experts, as a fraction of what the device can do,
beside others' kernels."""

import functools
from multiprocessing.pool import Pool
from pathlib import Path

import torch

from bench.gpu import device, results
from bench.gpu.compiling import Work, compile_all, shipped
from bench.gpu.launches import launch_attention, launch_linear
from bench.gpu.machine import Call, Machine
from bench.gpu.results import Recorder, Value, Values, path_of
from bench.gpu.subject import Subject
from bench.gpu.subjects import attention, chosen, dense, drawing, quantized, stepping
from bench.gpu.timing import Timing, microseconds, num_input_sets, time_calls
from llmd_kernels.paged_attention.tiles import find_config

OURS = "llmd"
# Configurations of the proofs that are measured here: those of a proof whose names match.
SHIPPED = {
    "quantized_linear": r"(bfloat16 .*)?(4096 → 28672|14336 → 4096), (int[48] by 128|float8 by 128×128).*",
    "linear_draw": r"bfloat16 \d+×4096 → 128256",
    "sample_on_device": r"float32 128256 (plain|filters)",
    "route": r"Qwen3-30B-A3B bfloat16",
    "experts": r"Qwen3-30B-A3B( |, float4,).*",
    "rope_kv_write": r"Llama-3.1-8B bfloat16",
    "add_rms_norm": r"bfloat16 4096",
    "gated_mul": r"silu bfloat16 14336",
    "paged_attention": r"work list",
    "step_inputs": r"256 rows",
}
# In the order of what is wanted most, should time run out.
KINDS = (dense, attention, drawing, quantized, chosen, stepping)


def measure(machine: Machine, recorder: Recorder, pool: Pool, folder: Path) -> None:
    recorder.row("compiling", lambda: _compile(machine, pool), is_limited=False)
    peaks = read_peaks(folder)
    with machine.running():
        for kind in KINDS:
            for subject in kind.subjects(machine):
                recorder.row(subject.name, lambda subject=subject: _measure(machine, subject, peaks))


def _compile(machine: Machine, pool: Pool) -> Values:
    """Nearly all; the rest is small and compiled as it comes."""
    sizes, model = machine.sizes, machine.sizes.model
    works: list[Work] = [
        functools.partial(launch_linear, shape, num_tokens)
        for shape in model.linears.values()
        for num_tokens in sizes.linear_tokens
    ]
    config = find_config(machine.arch, model.head_dim, torch.bfloat16, torch.bfloat16)
    if config is not None:
        heads = (model.num_heads, model.num_kv_heads, model.head_dim)
        # A number that is 1, a multiple of 16 or neither is each compiled for.
        works += [
            functools.partial(launch_attention, heads, sizes.block_size, config, num_seqs=num_seqs)
            for num_seqs in sorted({num_seqs for num_seqs, _ in sizes.decode} | {16})
        ]
    works += shipped(SHIPPED, machine.arch)
    return compile_all(pool, machine, works[: sizes.sweep_configurations])


def read_peaks(folder: Path) -> tuple[float, float] | None:
    """(bytes, operations) a second that the first stage saw on this device; None without it."""
    path = path_of(folder, "device")
    if not path.exists():
        return None
    rows = {row.name: row.values for row in results.read(path).rows if row.error is None}
    if device.COPY not in rows or device.MATRIX not in rows:
        return None
    return float(rows[device.COPY]["GB/s"] or 0) * 1e9, float(rows[device.MATRIX]["TFLOP/s"] or 0) * 1e12


def _measure(machine: Machine, subject: Subject, peaks: tuple[float, float] | None) -> Values:
    """All implementations on the same inputs, one after the other. A peer that fails is no failure of ours."""
    sets = [subject.make(seed) for seed in range(num_input_sets(machine, subject.bytes_moved))]
    ours = time_calls(machine, [calls[OURS] for calls in sets])
    values = {"us": microseconds(ours), "timing": ours.how, "spread": round(ours.spread, 3), **_rates(subject, ours)}
    if peaks is not None:
        limit = max(subject.bytes_moved / peaks[0], subject.operations / peaks[1])
        values |= {"limit us": limit * 1e6, "of limit": limit / ours.seconds}
    for peer in [name for name in sets[0] if name != OURS]:
        values |= _peer(machine, peer, [calls[peer] for calls in sets])
    return values


def _rates(subject: Subject, timing: Timing) -> dict[str, Value]:
    return {
        "GB/s": subject.bytes_moved / timing.seconds / 1e9,
        "TFLOP/s": subject.operations / timing.seconds / 1e12,
    }


def _peer(machine: Machine, name: str, calls: list[Call]) -> dict[str, Value]:
    try:
        return {f"{name} us": microseconds(time_calls(machine, calls))}
    except Exception as error:
        return {f"{name} us": None, f"{name} error": f"{type(error).__name__}: {error}"[:300]}
