"""Stage: other tilings of `linear` and attention, compiled side by side; the fastest become a proposal, `tiles.json`.

For `linear` only tilings that change no bit are tried. Attention's `tile` and `split` do change bits, so a proposal for
it is one tiling for all steps.
"""

import functools
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch

from bench.gpu.compiling import Work, compile_all
from bench.gpu.contexts import random_cache
from bench.gpu.launches import launch_attention, launch_linear, with_tile
from bench.gpu.machine import Call, Machine
from bench.gpu.results import Recorder, Value, Values
from bench.gpu.timing import microseconds, num_input_sets, time_calls, time_made
from llmd_kernels.linear import cost as linear_cost
from llmd_kernels.linear import triton_ops as linear_ops
from llmd_kernels.linear.tiles import Tile, candidates, cycles, find_device, with_pointers
from llmd_kernels.paged_attention import cost as attention_cost
from llmd_kernels.paged_attention import triton_ops as attention_ops
from llmd_kernels.paged_attention.tiles import TileConfig, find_config

PROPOSAL_FILE = "tiles.json"
LINEAR_FIELDS = tuple(Tile.__dataclass_fields__)
ATTENTION_FIELDS = tuple(TileConfig.__dataclass_fields__)
# Tiles for many tokens are tried as long as their estimate is no worse than so many times the best.
_HOPELESS = 1.6


def measure(machine: Machine, recorder: Recorder, pool: Pool, folder: Path) -> None:
    recorder.row("compiling", lambda: _compile(machine, pool), is_limited=False)
    groups: dict[str, list[str]] = {}
    with machine.running():
        attends = _attends(machine)
        for config in attention_tiles(machine):
            name = f"paged_attention, {_shown(asdict(config))}"
            recorder.row(name, lambda config=config: _tried(lambda: _time_attention(machine, config, attends)))
            groups.setdefault("paged_attention", []).append(name)
        _write_proposal(folder, recorder, groups)
        for group, num_tokens, shape in _linears(machine):
            for tile in linear_tiles(machine, num_tokens, shape):
                name = f"{group}, {_shown(asdict(tile))}"
                recorder.row(
                    name,
                    lambda shape=shape, num_tokens=num_tokens, tile=tile: _tried(
                        lambda: _time_linear(machine, shape, num_tokens, tile)
                    ),
                )
                groups.setdefault(group, []).append(name)
            _write_proposal(folder, recorder, groups)


def linear_tiles(machine: Machine, num_tokens: int, shape: tuple[int, int]) -> list[Tile]:
    """What ships first."""
    shipped = linear_ops.tile_of_launch(num_tokens, *shape, device=machine.device)
    few = num_tokens <= linear_ops.MAX_SPLIT_TOKENS
    found = _tiles_of_few(shipped) if few else _tiles_of_many(machine, num_tokens, shape)
    return [shipped, *(tile for tile in found if tile != shipped)][: machine.sizes.sweep_configurations]


def _tiles_of_few(shipped: Tile) -> list[Tile]:
    return [
        replace(shipped, outputs=outputs, num_warps=num_warps, num_stages=num_stages)
        for outputs in (64, 128)
        for num_warps in (4, 8)
        for num_stages in (3, 5)
    ]


def _tiles_of_many(machine: Machine, num_tokens: int, shape: tuple[int, int]) -> list[Tile]:
    """Those that can be chosen, the most promising first."""
    num_inputs, num_outputs = shape
    device, span = find_device(machine.arch), linear_ops.span_of(num_outputs, num_inputs)
    size = num_tokens, num_inputs, num_outputs
    times = {
        tile: cycles(tile, size, span, device, machine.num_processors)
        for tile in candidates(device, has_spans=span < num_inputs)
    }
    promising = [tile for tile, time in times.items() if time <= _HOPELESS * min(times.values())]
    return with_pointers(sorted(promising, key=times.__getitem__))


def attention_tiles(machine: Machine) -> list[TileConfig]:
    """What ships first; none where nothing ships."""
    shipped = find_config(machine.arch, machine.sizes.model.head_dim, torch.bfloat16, torch.bfloat16)
    if shipped is None:
        return []
    found = [
        TileConfig(rows, tile, 256, num_warps, num_stages, programs)
        for rows in (16, 64)
        for tile in (32, 64, 128)
        for num_warps in (4, 8)
        for num_stages, programs in ((2, 2), (3, 1), (3, 2), (4, 1))
    ]
    return [shipped, *(config for config in found if config != shipped)][: machine.sizes.sweep_configurations]


def _linears(machine: Machine) -> list[tuple[str, int, tuple[int, int]]]:
    """In the order of what is wanted most, should time run out."""
    shapes = machine.sizes.model.linears
    return [
        (f"linear {name}, {num_tokens} tokens", num_tokens, shapes[name])
        for num_tokens in machine.sizes.sweep_tokens
        for name in machine.sizes.sweep_linears
    ]


def _compile(machine: Machine, pool: Pool) -> Values:
    works: list[Work] = [
        functools.partial(launch_linear, shape, num_tokens, tile)
        for _, num_tokens, shape in _linears(machine)
        for tile in linear_tiles(machine, num_tokens, shape)
    ]
    model = machine.sizes.model
    heads = (model.num_heads, model.num_kv_heads, model.head_dim)
    works += [
        functools.partial(launch_attention, heads, machine.sizes.block_size, config)
        for config in attention_tiles(machine)
    ]
    return compile_all(pool, machine, works)


def _tried(time: Callable[[], Values]) -> Values:
    """A tiling that needs more registers or shared memory than there are is a finding, not a failure."""
    try:
        return time()
    except Exception as error:
        return {"us": None, "error": f"{type(error).__name__}: {error}"[:300]}


def _time_linear(machine: Machine, shape: tuple[int, int], num_tokens: int, tile: Tile) -> Values:
    num_inputs, num_outputs = shape

    def make(seed: int) -> Call:
        x = torch.randn(num_tokens, num_inputs, device=machine.device, dtype=torch.bfloat16)
        weight = torch.randn(num_outputs, num_inputs, device=machine.device, dtype=torch.bfloat16)
        return lambda: linear_ops.linear(x, weight)

    num_bytes = linear_cost.bytes_moved(num_tokens, num_inputs, num_outputs, itemsize=2)
    with with_tile(tile):
        timing = time_made(machine, make, num_bytes=num_bytes)
    return {"us": microseconds(timing), **asdict(tile)}


Attend = Callable[[TileConfig], object]


def _attends(machine: Machine) -> Mapping[str, list[Attend]]:
    """Steps by name, each with several sets of inputs, made once for all tilings."""
    model = machine.sizes.model
    steps = {f"{num_seqs} × {context}": ([context] * num_seqs, 1) for num_seqs, context in machine.sizes.sweep_decode}
    longest = machine.sizes.prefill[-1]
    steps[f"prefill {longest}"] = ([longest], longest)
    attends = {}
    for name, (lens, num_queries) in steps.items():
        num_bytes = attention_cost.bytes_moved(
            [(num_queries, length) for length in lens],
            model.num_heads,
            model.num_kv_heads,
            model.head_dim,
            itemsize=2,
            cache_itemsize=2,
        )
        attends[name] = [
            _attend(machine, lens, num_queries, seed) for seed in range(num_input_sets(machine, num_bytes))
        ]
    return attends


def _attend(machine: Machine, lens: list[int], num_queries: int, seed: int) -> Attend:
    contexts = random_cache(machine, lens, seed=seed)
    step = contexts.step([num_queries] * len(lens))
    options: dict[str, Any] = {"scale": contexts.scale, "num_processors": machine.num_processors}
    return lambda config: attention_ops.paged_attention(*step, config=config, **options)


def _time_attention(machine: Machine, config: TileConfig, attends: Mapping[str, list[Attend]]) -> Values:
    """`us`: the geometric mean over the steps, so that none of them outweighs the others."""
    times: dict[str, Value] = {
        f"{name} us": microseconds(time_calls(machine, [functools.partial(attend, config) for attend in sets]))
        for name, sets in attends.items()
    }
    return {"us": statistics.geometric_mean(float(time or 0) for time in times.values()), **times, **asdict(config)}


def _write_proposal(folder: Path, recorder: Recorder, groups: Mapping[str, list[str]]) -> None:
    """For each group the fastest tiling beside the one that ships, which is its first."""
    entries = {}
    for group, names in groups.items():
        rows = [row for name in names if (row := recorder.rows.get(name)) and row["us"]]
        if rows:
            fields = ATTENTION_FIELDS if group == "paged_attention" else LINEAR_FIELDS
            shipped, fastest = recorder.rows.get(names[0]), min(rows, key=lambda row: float(row["us"] or 0))
            entries[group] = {
                "shipped us": shipped["us"] if shipped else None,
                "us": fastest["us"],
                "tile": {field: fastest[field] for field in fields},
            }
    folder.joinpath(PROPOSAL_FILE).write_text(json.dumps(entries, indent=1) + "\n")


def _shown(fields: Mapping[str, object]) -> str:
    return " ".join(map(str, fields.values()))
