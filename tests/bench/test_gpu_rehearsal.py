"""`scripts/gpu-check --rehearse`: every stage runs on a CPU through the code that runs on a GPU, in every part."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from bench.gpu.__main__ import DEADLINES
from bench.gpu.results import Origin, Row, StageResult
from llmd_kernels.linear.tiles import Tile
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is built for Linux alone"),
]

# Rows that a stage must have, and values that each of them must have.
EXPECTED = {
    "device": {
        "versions": {"torch", "triton", "python", "arch"},
        "start of a process": {"import torch s", "context s"},
        "copy bandwidth": {"GB/s"},
        "read bandwidth": {"GB/s"},
        "matrix product, square": {"TFLOP/s"},
    },
    "correctness": {
        "compiling": {"launches", "s", "errors"},
        "rms_norm, cases": {"cases", "largest error"},
        "step_inputs, cases": {"cases"},
        "all_reduce_add_rms_norm, ranks of one launch": {"largest error"},
        "linear, shipped tiles": {"largest error"},
        "linear, any number of tokens": {"numbers of tokens"},
        "linear, any number of columns": {"columns", "bitwise"},
        "linear, any tile": {"tiles", "bitwise"},
        "paged_attention, any chunks": {"bitwise"},
        "paged_attention, last to arrive": {"launches", "bitwise"},
        "compute-sanitizer": {"tool"},
    },
    "kernels": {
        "add_rms_norm, 2 tokens": {"us", "of limit", "torch.compile us"},
        "gated_mul silu, 2 tokens": {"us"},
        "rope_kv_write, 2 tokens": {"us", "torch us"},
        "linear lm_head, 3 tokens": {"us", "TFLOP/s", "cuBLAS us"},
        "paged_attention, decode 2 × 40": {"us", "GB/s", "limit us", "SDPA us", "flex_attention us"},
        "paged_attention, prefill 20": {"us", "SDPA us"},
        "paged_attention fp8 KV, decode 2 × 40": {"us", "llmd in bfloat16 us"},
        "quantized_linear int4 o, 2 tokens": {"us", "of limit", "cuBLAS bfloat16 us"},
        "quantized_linear int8 o, 2 tokens": {"us"},
        "quantized_linear fp8 o, 2 tokens": {"us"},
        "linear_draw plain, 2 rows": {"us", "cuBLAS and argmax us"},
        "sample_on_device top-k and top-p, 2 rows": {"us", "torch sort us"},
        "scale_logits, 2 rows": {"us", "torch us"},
        "route, 2 tokens": {"us", "torch us"},
        "experts, 2 tokens": {"us", "loop of torch.mm us"},
        "step_inputs and work list, 2 × 40": {"us"},
    },
    "steps": {
        "random weights and KV cache": {"s", "blocks"},
        "decode step, 2 at once": {"us", "graph us", "idle us", "host us", "launch us", "limit us", "of limit"},
        "graphs as launches one by one": {"tokens", "bitwise"},
        "alone as in company": {"at once", "bitwise"},
        "whole prompts as in chunks": {"tokens", "bitwise"},
    },
    "sweep": {"compiling": {"launches"}, "linear o, 3 tokens, 64 16 4 5 False False": {"us", "outputs", "num_stages"}},
    "server": {
        "start, cold compile cache": {"port open s", "health answers s", "ready s", "first token s"},
        "start, warm compile cache": {"port open s", "ready s", "first token s"},
        "capturing graphs": {"s"},
        "first token, idle, prompt of 24": {"TTFT p50 ms"},
        "load, 1 at once": {"output tok/s", "TTFT p50 ms", "ITL p50 ms", "ITL p99 ms", "engine CPU us a step"},
        "fp8 KV: load, 3 at once": {"ready s", "output tok/s"},
        "load, 3 at once": {"output tok/s", "steps", "worker CPU us a step", "server CPU us a step"},
    },
}


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("rehearsal")
    return folder, gpu_check("--rehearse", "--out", str(folder))


def result(folder: Path, stage: str) -> StageResult:
    return msgspec.json.decode((folder / f"{stage}.json").read_bytes(), type=StageResult)


def test_every_stage_is_good(rehearsed: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, finished = rehearsed
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    for stage in DEADLINES:
        assert result(folder, stage).is_good
        assert result(folder, stage).origin.rehearsal


def test_each_file_has_exactly_the_fields_of_its_schema(
    rehearsed: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = rehearsed
    for stage in DEADLINES:
        found = json.loads((folder / f"{stage}.json").read_text())
        assert set(found) == names(StageResult)
        assert set(found["origin"]) == names(Origin)
        assert all(set(row) == names(Row) for row in found["rows"])


def names(schema: type) -> set[str]:
    return {field.name for field in dataclasses.fields(schema)}


@pytest.mark.parametrize("stage", EXPECTED)
def test_every_measurement_is_there_and_printed(
    rehearsed: tuple[Path, subprocess.CompletedProcess[str]], stage: str
) -> None:
    folder, finished = rehearsed
    rows = {row.name: row.values for row in result(folder, stage).rows}
    for name, values in EXPECTED[stage].items():
        assert values <= {key for key, value in rows[name].items() if value is not None}, name
        assert f"{stage:<12}{name}" in finished.stdout


def test_the_sweep_leaves_a_proposal_beside_what_ships(
    rehearsed: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = rehearsed
    proposal = json.loads((folder / "tiles.json").read_text())
    assert set(proposal) == {"paged_attention", "linear o, 3 tokens"}
    assert proposal["linear o, 3 tokens"]["tile"] == dataclasses.asdict(Tile(64, 16, 4, 5))
    for entry in proposal.values():
        assert 0 < entry["us"] <= entry["shipped us"]


def test_a_second_call_does_nothing(rehearsed: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = rehearsed
    before = {stage: (folder / f"{stage}.json").read_bytes() for stage in DEADLINES}
    again = gpu_check("--rehearse", "--out", str(folder))
    assert again.returncode == 0
    assert again.stdout.count("done already") == len(DEADLINES)
    assert {stage: (folder / f"{stage}.json").read_bytes() for stage in DEADLINES} == before


def test_stages_can_be_chosen_and_unknown_ones_are_named(tmp_path: Path) -> None:
    refused = gpu_check("--rehearse", "--stages", "device,nonsense", "--out", str(tmp_path))
    assert refused.returncode == 2
    assert "no stage nonsense; there are device, correctness, kernels, steps, server, sweep" in refused.stderr
    assert gpu_check("--rehearse", "--stages", "device", "--out", str(tmp_path)).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["device.json"]
