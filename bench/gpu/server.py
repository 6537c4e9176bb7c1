"""Stage: `llmd serve` over HTTP with random weights of Llama-3.1-8B: start, speed, the host's share of a step.

Needs no torch: the GPU is the server's alone.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench.gpu.load import Asked, figures, wave
from bench.gpu.packages import ROOT, check_packages
from bench.gpu.results import Recorder, Values
from bench.gpu.serving import ServerProcess
from bench.gpu.sizes import TINY, WHOLE, Load

# Ids below are plain text in every vocabulary that is served here.
_NUM_IDS = 200
# Seconds that a worker may capture graphs for before it is measured.
_CAPTURING = 30.0
# Seconds from the beginning of the stage: another server is started no later, so that it can be measured in time.
_LAST_START = 125.0
# What else is served, each by a server of its own: flags behind those of all, of which the last counts.
OTHERS = {"fp8 KV": ["--kv-cache-dtype", "fp8"], "qwen3-8b": ["--model", "qwen3-8b"]}


def measure(recorder: Recorder, *, rehearsal: bool) -> None:
    check_packages()
    started = time.monotonic()
    load = (TINY if rehearsal else WHOLE).load
    # The same for every run, so that one that goes on after the first start finds it warm.
    cache = Path(tempfile.gettempdir()) / f"llmd-gpu-check-{'rehearsal-' * rehearsal}{os.getuid()}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = [*_flags(load, folder, rehearsal=rehearsal), "--download-dir", str(cache)]
        server = ServerProcess(flags, folder=folder)
        recorder.row("start, cold compile cache", lambda: _cold_start(server, cache, load))
        with server:
            timeline = server.wait_ready()
            recorder.row("start, warm compile cache", lambda: {**timeline, **_first_token(server, load)})
            recorder.row("capturing graphs", lambda: {"s": server.wait_idle(_CAPTURING)})
            _measure_load(recorder, server, load)
        concurrency = max(concurrency for concurrency, _ in load.waves)
        for name in load.others:
            if time.monotonic() - started < _LAST_START:
                recorder.row(
                    f"{name}: load, {concurrency} at once",
                    lambda name=name: _other([*flags, *OTHERS[name]], folder, load, concurrency),
                )


def _other(flags: list[str], folder: Path, load: Load, concurrency: int) -> Values:
    """Start it; the largest wave once, behind a short one that brings what must be compiled."""
    with ServerProcess(flags, folder=folder) as server:
        timeline = server.wait_ready()
        server.wait_idle(_CAPTURING)
        _wave(server, replace(load, output_tokens=8), concurrency, 1, seed=1)
        return {"ready s": timeline["ready s"], **_wave(server, load, concurrency, 1, seed=2)}


def _measure_load(recorder: Recorder, server: ServerProcess, load: Load) -> None:
    seeds = iter(range(100, 200))
    # What the first requests of a size compile or capture is no part of what follows.
    largest = max(concurrency for concurrency, _ in load.waves)
    recorder.row("warm-up", lambda: _wave(server, load, largest, 1, seed=next(seeds)))
    for num_tokens in load.first_token_prompts:
        recorder.row(
            f"first token, idle, prompt of {num_tokens}",
            lambda num_tokens=num_tokens: _idle(server, load, num_tokens, seed=next(seeds)),
        )
    for concurrency, requests in load.waves:
        recorder.row(
            f"load, {concurrency} at once",
            lambda run=(concurrency, requests): _wave(server, load, *run, seed=next(seeds)),
        )


def _flags(load: Load, folder: Path, *, rehearsal: bool) -> list[str]:
    concurrency = max(concurrency for concurrency, _ in load.waves)
    flags = ["--load-format", "dummy", "--max-num-seqs", str(concurrency)]
    if not rehearsal:
        return [*flags, "--model", "llama-3.1-8b", "--dtype", "bfloat16", "--max-model-len", "2048"]
    return [*flags, "--model", str(tiny_model(folder / "tiny")), "--device", "cpu", "--threads", "1"]


def tiny_model(folder: Path, **sizes: int) -> Path:
    """A built-in configuration is too large to rehearse with."""
    # Scripts are programs, not packages.
    sys.path.append(str(ROOT / "scripts"))
    from make_tiny_model import make_tiny_model

    return make_tiny_model(folder, **sizes)


def _cold_start(server: ServerProcess, cache: Path, load: Load) -> Values:
    shutil.rmtree(cache, ignore_errors=True)
    with server:
        return {**server.wait_ready(), **_first_token(server, load)}


def _first_token(server: ServerProcess, load: Load) -> Values:
    """Seconds from the command until the first token has come, with one prompt."""
    answers, seconds = wave(_asked(server, load), concurrency=1, requests=1, seed=1)
    return {"first token s": server.since_start() - seconds + answers[0].first_token}


def _idle(server: ServerProcess, load: Load, num_tokens: int, *, seed: int) -> Values:
    asked = replace(_asked(server, load), prompt_tokens=num_tokens, output_tokens=2)
    answers, _ = wave(asked, concurrency=1, requests=load.first_token_requests, seed=seed)
    times = [1e3 * answer.first_token for answer in answers]
    return {"TTFT p50 ms": statistics.median(times), "TTFT max ms": max(times), "requests": len(times)}


def _wave(server: ServerProcess, load: Load, concurrency: int, requests: int, *, seed: int) -> Values:
    with server.counting() as counted:
        answers, seconds = wave(_asked(server, load), concurrency=concurrency, requests=requests, seed=seed)
    return {**figures(answers, seconds), **counted, "requests": len(answers)}


def _asked(server: ServerProcess, load: Load) -> Asked:
    return Asked(server.port, server.model, load.prompt_tokens, load.output_tokens, _NUM_IDS)
