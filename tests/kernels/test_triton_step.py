"""Several steps on static tensors, as a captured step runs, against steps that the host builds: bitwise the same.

The host sends prompts and blocks only; it is never asked for what was drawn. In the interpreter, everything in Triton.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmd_kernels import (
    BLOCK_TABLES,
    TOKEN_IDS,
    AttentionBatch,
    HostLens,
    LayerKind,
    NewEntries,
    allocate_inputs,
    allocate_tables,
    allocate_work,
    append_token_ids,
    dispatch,
    pack_step,
    pack_work,
    paged_attention,
    rope_kv_write,
    step_inputs,
    write_differences,
)

# Inside of the interpreter it is too late to import kernels.
from llmd_kernels.paged_attention import plan_kernel, triton_ops
from llmd_kernels.paged_attention.device_work import allocate_lists
from llmd_kernels.paged_attention.host_work import SentWork, pack_lists
from llmd_kernels.paged_attention.items import FIELDS
from llmd_kernels.paged_attention.tiles import TileConfig
from llmd_kernels.paged_attention.workspace import cut_for
from llmd_kernels.rope_kv_write import triton_ops as rope_triton_ops
from llmd_kernels.step_inputs import triton_ops as step_inputs_triton_ops
from tests.kernels.proof.compiler import compiled_for
from tests.kernels.proof.inputs import meta, randn
from tests.kernels.proof.interpreter import Launch, interpreted

assert plan_kernel
assert rope_triton_ops
assert step_inputs_triton_ops

# So that contexts of a few dozen tokens have several splits.
TILES = TileConfig(rows=16, tile=16, split=16, num_warps=4, num_stages=1, programs_per_processor=1)
CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM, VOCAB, BLOCK_SIZE = 4, 2, 16, 50, 16
KINDS = (LayerKind(HEADS, KV_HEADS, HEAD_DIM), LayerKind(HEADS, KV_HEADS, HEAD_DIM, window=17))
MAX_ROWS, MAX_TOKENS, MAX_LOGITS, MAX_LEN = 4, 16, 10, 48
NUM_PLACES, NUM_BLOCKS = 4, 9


@pytest.fixture(autouse=True)
def _small_tiles_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"cpu"})
    monkeypatch.setattr(triton_ops, "processors", lambda _: triton_ops.Processors("sm_90", 2))
    # The package's attribute of this name is the function.
    package = sys.modules["llmd_kernels.paged_attention"]
    monkeypatch.setattr(package, "find_config", lambda *_: TILES)


class Network:
    """Two layers whose projections are looked up, with one kind of attention each, and a cache of their own."""

    def __init__(self) -> None:
        width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.projections = [randn(VOCAB, width, dtype=torch.bfloat16, seed=layer) for layer in range(2)]
        self.cos_sin = randn(MAX_LEN, HEAD_DIM, seed=5)
        # A padding token writes to a slot of its own: two programs at one slot are a race, though nobody reads it.
        shape = (NUM_BLOCKS + MAX_TOKENS // BLOCK_SIZE, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        self.caches = [torch.zeros(2, *shape, dtype=torch.bfloat16) for _ in KINDS]

    def forward(self, token_ids: Tensor, positions: Tensor, slots: Tensor, batch: AttentionBatch) -> Tensor:
        """[T, heads, D] of the last layer."""
        out = torch.zeros(len(token_ids), HEADS, HEAD_DIM, dtype=torch.bfloat16)
        for kind, projection, (k_cache, v_cache) in zip(KINDS, self.projections, self.caches, strict=True):
            qkv = projection[token_ids]
            qkv[:, : HEADS * HEAD_DIM] += out.flatten(1)
            q = rope_kv_write(
                qkv,
                positions=positions,
                slots=slots,
                k_cache=k_cache,
                v_cache=v_cache,
                num_heads=HEADS,
                num_kv_heads=KV_HEADS,
                cos_sin=self.cos_sin,
            )
            out = paged_attention(q, k_cache, v_cache, batch, scale=0.25, window=kind.window)
        return out


def draw(rows: Tensor) -> Tensor:
    """Any function that every bit decides: [n, heads, D] → [n]."""
    return rows.view(torch.int16).long().sum((1, 2)) % VOCAB


@dataclass
class Sequence:
    place: int
    token_ids: list[int]
    block_ids: list[int]
    num_done: int = 0


@dataclass(frozen=True)
class Row:
    sequence: Sequence
    num_tokens: int
    samples: bool
    num_prompt_logits: int = 0

    @property
    def end(self) -> int:
        return self.sequence.num_done + self.num_tokens


@dataclass
class Host:
    """Builds each step from lists, as long as it is, and knows what was drawn."""

    network: Network = field(default_factory=Network)

    def run(self, rows: list[Row]) -> tuple[Tensor, list[int]]:
        token_ids: list[int] = []
        positions: list[int] = []
        for row in rows:
            token_ids += row.sequence.token_ids[row.sequence.num_done : row.end]
            positions += range(row.sequence.num_done, row.end)
        of = [row.sequence for row in rows for _ in range(row.num_tokens)]
        slots = [s.block_ids[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for s, p in zip(of, positions, strict=True)]
        lens = HostLens(np.array([0, *(row.num_tokens for row in rows)]).cumsum(), np.array([row.end for row in rows]))
        tables = torch.zeros(len(rows), max(len(row.sequence.block_ids) for row in rows), dtype=torch.int64)
        for table, row in zip(tables, rows, strict=True):
            table[: len(row.sequence.block_ids)] = torch.tensor(row.sequence.block_ids)
        # Lengths that nobody can read: only the host's are there.
        unreadable = torch.empty(len(rows) + 1, dtype=torch.int64, device="meta")
        batch = AttentionBatch(unreadable, unreadable[1:], tables, BLOCK_SIZE, work_lists=sent_work(lens))
        out = self.network.forward(torch.tensor(token_ids), torch.tensor(positions), torch.tensor(slots), batch)
        last = [int(start) - 1 for start in lens.query_starts[1:]]
        return out, draw(out[last]).tolist()


BF16 = {"q_dtype": torch.bfloat16, "cache_dtype": torch.bfloat16}


def sent_work(lens: HostLens) -> SentWork:
    """The lists of both kinds of layers, in a buffer that holds other things too."""
    packed = pack_work(KINDS, lens, block_size=BLOCK_SIZE, device=CPU, **BF16)
    assert packed is not None
    buffer = torch.full((len(packed.numbers) + 16,), 2**31 - 1, dtype=torch.int32)
    buffer[8:-8] = torch.from_numpy(packed.numbers)
    return packed.on_device(buffer[8:])


class Device:
    """Tensors that stay, and a list of operations on them that is the same in each step."""

    def __init__(self) -> None:
        self.network = Network()
        self.tables = allocate_tables(NUM_PLACES, MAX_LEN, block_size=BLOCK_SIZE, device=CPU)
        self.inputs = allocate_inputs(MAX_ROWS, MAX_TOKENS, MAX_LOGITS, device=CPU)
        work = allocate_work(
            KINDS,
            max_seqs=MAX_ROWS,
            max_tokens=MAX_TOKENS,
            max_len=MAX_LEN,
            block_size=BLOCK_SIZE,
            device=CPU,
            **BF16,
        )
        assert work is not None
        self.work = work
        self.batch = self.inputs.attention(self.tables, block_size=BLOCK_SIZE, work_lists=work)
        self.step = torch.zeros(200, dtype=torch.int32)

    def run(self, rows: list[Row], new_entries: list[NewEntries]) -> tuple[Tensor, list[int], list[Launch]]:
        packed = [
            (row.sequence.place, row.sequence.num_done, row.num_tokens, row.num_prompt_logits, row.samples)
            for row in rows
        ]
        step = torch.from_numpy(pack_step(packed, new_entries, max_rows=MAX_ROWS))
        self.step[: len(step)] = step
        self.step[len(step) :] = 2**31 - 1
        inputs = self.inputs
        with interpreted(shuffle=3) as launches:
            write_differences(self.step, self.tables, max_rows=MAX_ROWS)
            step_inputs(self.step, self.tables, inputs, block_size=BLOCK_SIZE, work_lists=self.work)
            out = self.network.forward(inputs.token_ids, inputs.positions, inputs.slots, self.batch)
            drawn = draw(out[inputs.logit_rows][inputs.sampled_logits])
            append_token_ids(drawn, self.tables, inputs)
        return out, drawn.tolist(), launches


def prompt_entries(sequence: Sequence) -> list[NewEntries]:
    return [
        NewEntries(TOKEN_IDS, sequence.place, 0, sequence.token_ids),
        NewEntries(BLOCK_TABLES, sequence.place, 0, sequence.block_ids),
    ]


def steps() -> Iterator[tuple[list[Row], list[NewEntries]]]:
    """Chunks of a prompt; others that come, decode and go; a place and blocks that others had."""
    ids = torch.randint(0, VOCAB, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    first = Sequence(2, ids[:30], [7, 3])
    yield [Row(first, 15, samples=False)], prompt_entries(first)
    second = Sequence(0, ids[30:31], [2])
    yield [Row(second, 1, samples=True), Row(first, 15, samples=True)], prompt_entries(second)
    yield [Row(first, 1, samples=True), Row(second, 1, samples=True)], []
    third = Sequence(0, ids[31:39], [2])
    rows = [Row(third, 8, True, num_prompt_logits=7), Row(first, 1, samples=True)]
    yield rows, prompt_entries(third)
    fourth = Sequence(3, ids[40:58], [1, 4])
    first.block_ids += [8]
    new_block = NewEntries(BLOCK_TABLES, 2, 2, [8])
    yield [Row(first, 1, True), Row(fourth, 12, False), Row(third, 1, True)], [*prompt_entries(fourth), new_block]
    yield [Row(fourth, 6, True), Row(third, 1, True), Row(first, 1, True)], []


def test_static_steps_are_bitwise_those_that_the_host_builds() -> None:
    host, device = Host(), Device()
    programs = set()
    is_shared = [False, False]
    for rows, new_entries in steps():
        out, drawn, launches = device.run(rows, new_entries)
        with interpreted():
            expected, expected_drawn = host.run(rows)
        num_tokens = sum(row.num_tokens for row in rows)
        assert torch.equal(out[:num_tokens], expected)
        assert (out[num_tokens:] == 0).all()
        assert drawn[: sum(row.samples for row in rows)] == [
            token_id for token_id, row in zip(expected_drawn, rows, strict=True) if row.samples
        ]
        for row, token_id in zip(rows, expected_drawn, strict=True):
            row.sequence.num_done += row.num_tokens
            if row.samples:
                row.sequence.token_ids.append(token_id)
            kept = device.tables.token_ids[row.sequence.place, : len(row.sequence.token_ids)]
            assert kept.tolist() == row.sequence.token_ids
        for cache, truth in zip(device.network.caches, host.network.caches, strict=True):
            assert torch.equal(cache[:, :NUM_BLOCKS], truth[:, :NUM_BLOCKS])
        assert (device.work.scratch.counters == 0).all()
        num_parts = [planned.workspace.items[:, FIELDS.index("num_parts")] for planned in device.work.lists.values()]
        is_shared = [
            is_before or bool((parts > 1).any()) for is_before, parts in zip(is_shared, num_parts, strict=True)
        ]
        programs.add(tuple((launch.kernel, launch.grid) for launch in launches))
    assert is_shared == [True, True]
    # What a graph records once serves every step.
    assert len(programs) == 1


def test_a_static_batch_without_lists_is_refused() -> None:
    device = Device()
    batch = device.inputs.attention(device.tables, block_size=BLOCK_SIZE)
    token_ids = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match="needs work_lists"), interpreted():
        device.network.forward(token_ids, token_ids, torch.arange(8), batch)


def test_a_kind_of_layer_that_was_not_named_is_refused() -> None:
    device = Device()
    q = torch.zeros(8, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    sent = replace(device.batch, work_lists=sent_work(HostLens(np.array([0, 8]), np.array([8]))))
    for batch in (device.batch, sent):
        with pytest.raises(ValueError, match="no work list for LayerKind"), interpreted():
            paged_attention(q, *device.network.caches[0], batch, scale=1.0, window=18)


def test_there_are_no_lists_where_attention_is_not_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"max_seqs": 2, "max_tokens": 8, "max_len": 20}
    float64 = {"q_dtype": torch.float64, "cache_dtype": torch.float64}

    def are_made(*, block_size: int = BLOCK_SIZE, **dtypes: torch.dtype) -> bool:
        """By the device as by the host."""
        options: dict[str, Any] = {"block_size": block_size, "device": CPU, **dtypes}
        by_device = allocate_work(KINDS, **sizes, **options) is not None
        by_host = pack_work(KINDS, HostLens(np.array([0, 1]), np.array([5])), **options) is not None
        assert by_device == by_host
        return by_host

    assert are_made(**BF16)
    assert not are_made(**BF16, block_size=8)
    assert not are_made(**float64)
    monkeypatch.setattr(sys.modules["llmd_kernels.paged_attention"], "find_config", lambda *_: None)
    assert not are_made(**BF16)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_one_compiled_kernel_serves_steps_of_all_sizes(arch: str) -> None:
    """Whether the host or the device makes attention's work list, too: a captured step has the bits of another."""
    with compiled_for(arch) as kernels:
        for max_rows, max_tokens, max_len in ((1, 1, 16), (16, 16, 4096), (200, 513, 100)):
            launch_without_memory(max_rows, max_tokens, max_len)
    codes: dict[str, set[bytes]] = {}
    for kernel in kernels:
        codes.setdefault(kernel.kernel, set()).add(kernel.code)
    assert {name: len(code) for name, code in codes.items()} == dict.fromkeys(codes, 1)
    assert set(codes) == {
        "write_differences_kernel",
        "step_inputs_kernel",
        "append_token_ids_kernel",
        "plan",
        "attend",
    }


def launch_without_memory(max_rows: int, max_tokens: int, max_len: int) -> None:
    device = torch.device("meta")
    tables = allocate_tables(300, max_len, block_size=BLOCK_SIZE, device=device)
    made = allocate_inputs(max_rows, max_tokens, max_rows, device=device)
    step = meta(1000, dtype=torch.int32)
    step_inputs_triton_ops.write_differences(step, tables, max_rows=max_rows)
    step_inputs_triton_ops.step_inputs(step, tables, made, block_size=BLOCK_SIZE)
    step_inputs_triton_ops.append_token_ids(meta(max_rows, dtype=torch.int64), tables, made)
    (kind, *_) = KINDS
    work = allocate_lists(
        {kind: TILES}, max_seqs=max_rows, max_tokens=max_tokens, max_len=max_len, num_processors=9, device=device
    )
    work.plan(made.query_starts, made.kv_lens, made.places)
    cache = meta(100, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=torch.bfloat16)
    q = meta(max_tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    packed = pack_lists({kind: cut_for(kind, TILES, 9)}, HostLens(np.array([0, 1]), np.array([5])))
    sent = packed.on_device(meta(len(packed.numbers), dtype=torch.int32))
    for batch in (
        made.attention(tables, block_size=BLOCK_SIZE, work_lists=work),
        AttentionBatch(made.query_starts, made.kv_lens, tables.block_tables[:1].long(), BLOCK_SIZE, work_lists=sent),
    ):
        triton_ops.paged_attention(q, cache, cache, batch, scale=1.0, config=TILES, num_processors=9)
