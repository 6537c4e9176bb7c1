"""Weights come from safetensors to their place exactly, and what is wrong is refused before anything is allocated."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_tiny_model import make_tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmd.errors import StartupFailed, UnsupportedModel
from llmd.model.checkpoint import load_decoder, load_parameters
from llmd.model.memory import weight_bytes
from llmd.model.parallel import Parameter, Piece, Rank, Shard
from llmd.model.parameters import parameters
from llmd.model.safetensors_folder import read_headers
from llmd.model.spec import load_spec
from tests.model.reference_models import CASES, make_reference, save_reference

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


def load_ranks(folder: Path, size: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    spec, stored = load_spec(folder), read_headers(folder)
    return [
        load_parameters(
            stored, parameters(spec), dtype=dtype, device=CPU, rank=Rank(i, size), progress=lambda _done, _total: None
        )
        for i in range(size)
    ]


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def load(folder: Path) -> list[tuple[int, int]]:
    """Load and say what the progress callback heard."""
    heard: list[tuple[int, int]] = []
    load_decoder(folder, dtype=torch.float32, device=CPU, progress=lambda done, total: heard.append((done, total)))
    return heard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model", tie_word_embeddings=False)


def test_projections_are_fused(folder: Path) -> None:
    stored = load_file(folder / WEIGHTS)
    (weights,) = load_ranks(folder, 1)
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    qkv = [stored[f"{attention}.{name}_proj.weight"] for name in "qkv"]
    gate_up = [stored[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(weights["layers.1.qkv.weight"], torch.cat(qkv))
    assert torch.equal(weights["layers.1.gate_up.weight"], torch.cat(gate_up))
    assert torch.equal(weights["head"], stored["lm_head.weight"])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_dtypes_are_converted_on_the_way(folder: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    (weights,) = load_ranks(folder, 1, wanted)
    assert torch.equal(weights["norm"], load_file(folder / WEIGHTS)["model.norm.weight"].to(wanted))
    assert all(weight.dtype == wanted for weight in weights.values())


def test_progress_goes_from_nothing_to_all(folder: Path) -> None:
    heard = load(folder)
    totals = {total for _, total in heard}
    done = [done for done, _ in heard]
    assert totals == {sum(4 * tensor.numel() for tensor in load_file(folder / WEIGHTS).values())}
    assert (done[0], done[-1]) == (0, totals.pop())
    assert done == sorted(done)


def test_sharded_checkpoints_are_read_through_their_index(folder: Path) -> None:
    (whole,) = load_ranks(folder, 1)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + i % 3:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (sharded,) = load_ranks(folder, 1)
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def joined(ranks: list[Tensor], parameter: Parameter) -> Tensor:
    """A parameter put together from all ranks' parts, piece by piece."""
    if parameter.num_experts is not None:
        ranks = [rank.flatten(0, 1) for rank in ranks]
    rows: list[Tensor] = []
    offsets = [0] * len(ranks)
    for piece in parameter.pieces:
        parts = []
        for index, weight in enumerate(ranks):
            num_rows = piece.shape(Rank(index, len(ranks)))[0]
            parts.append(weight[offsets[index] : offsets[index] + num_rows])
            offsets[index] += num_rows
        rows.append(torch.cat(parts, dim=piece.sharding.dim) if isinstance(piece.sharding, Shard) else parts[0])
    joined_rows = torch.cat(rows)
    return joined_rows if parameter.num_experts is None else joined_rows.unflatten(0, (parameter.num_experts, -1))


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_have_the_whole_model(size: int, tmp_path: Path) -> None:
    """9 heads over 3 KV heads on 2 ranks: one has 3 heads, the other 6."""
    folder = make_tiny_model(tmp_path, hidden_size=72, num_heads=9, num_kv_heads=3, intermediate_size=96)
    (whole,) = load_ranks(folder, 1)
    ranks = load_ranks(folder, size)
    assert ranks[0]["layers.0.qkv.weight"].shape[0] == (3 + 1 + 1) * 8
    assert ranks[-1]["layers.0.o.weight"].shape == (72, (6 if size == 2 else 3) * 8)
    for parameter in parameters(load_spec(folder)):
        assert torch.equal(joined([rank[parameter.name] for rank in ranks], parameter), whole[parameter.name])


@pytest.mark.parametrize("case", ["phi3", "olmo2", "qwen2", "mixtral", "qwen2 moe", "gpt-oss", "deepseek v3"])
def test_ranks_cut_fused_tensors_norms_biases_and_experts(case: str, tmp_path: Path) -> None:
    folder = save_reference(make_reference(*CASES[case]), tmp_path)
    (whole,) = load_ranks(folder, 1)
    ranks = load_ranks(folder, 2)
    for parameter in parameters(load_spec(folder)):
        assert torch.equal(joined([rank[parameter.name] for rank in ranks], parameter), whole[parameter.name])


def test_ranks_have_a_part_of_every_expert(tmp_path: Path) -> None:
    """The intermediate size is 24: three units of eight on two ranks. The router is everybody's."""
    folder = save_reference(make_reference(*CASES["qwen3 moe"]), tmp_path)
    (whole,) = load_ranks(folder, 1)
    first, second = load_ranks(folder, 2)
    assert whole["layers.0.experts.gate_up.weight"].shape == (7, 2 * 24, 48)
    assert first["layers.0.experts.gate_up.weight"].shape == (7, 2 * 8, 48)
    assert second["layers.0.experts.down.weight"].shape == (7, 48, 16)
    assert torch.equal(first["layers.0.router.weight"], whole["layers.0.router.weight"])


@pytest.mark.parametrize("case", ["mixtral", "gpt-oss"])
def test_experts_lie_as_their_kernel_reads_them(case: str, tmp_path: Path) -> None:
    """The gate's rows, then up's, from a tensor each or from transposed stacks in which they alternate."""
    folder = save_reference(make_reference(*CASES[case]), tmp_path)
    stored = load_file(folder / WEIGHTS)
    (weights,) = load_ranks(folder, 1)
    if case == "mixtral":
        there = "model.layers.2.block_sparse_moe.experts.3"
        gate, up, down = (stored[f"{there}.{name}.weight"] for name in ("w1", "w3", "w2"))
    else:
        there = "model.layers.2.mlp.experts"
        gate_up, down = stored[f"{there}.gate_up_proj"][3].T, stored[f"{there}.down_proj"][3].T
        gate, up = gate_up[0::2], gate_up[1::2]
        bias = stored[f"{there}.gate_up_proj_bias"][3]
        assert torch.equal(weights["layers.2.experts.gate_up.bias"][3], torch.cat((bias[0::2], bias[1::2])))
    assert torch.equal(weights["layers.2.experts.gate_up.weight"][3], torch.cat((gate, up)))
    assert torch.equal(weights["layers.2.experts.down.weight"][3], down)


def test_what_decides_the_choice_of_experts_stays_float32(tmp_path: Path) -> None:
    folder = save_reference(make_reference(*CASES["deepseek v3"]), tmp_path)
    heard: list[tuple[int, int]] = []
    spec = load_spec(folder)
    weights = load_parameters(
        read_headers(folder), parameters(spec), dtype=torch.bfloat16, device=CPU, rank=Rank(),
        progress=lambda done, total: heard.append((done, total)),
    )  # fmt: skip
    exact = {name.split(".", 2)[2] for name, weight in weights.items() if weight.dtype == torch.float32}
    assert exact == {"router.weight", "choice_bias"}
    assert heard[-1] == (weight_bytes(spec, dtype_bytes=2),) * 2
    assert sum(weight.nbytes for weight in weights.values()) == heard[-1][0]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop("model.layers.3.mlp.experts.6.up_proj.weight"), "layers.3.mlp.experts.6.up_proj"),
        (lambda t: t.update({"model.layers.1.mlp.experts.7.up_proj.weight": torch.ones(24, 48)}), "experts.7"),
        (lambda t: t.update({"model.layers.0.mlp.gate.weight": torch.ones(8, 48)}), r"mlp.gate.*\[8, 48\].*\[7, 48\]"),
    ],
    ids=["missing", "left over", "misshapen"],
)
def test_wrong_experts_are_refused_by_name(
    edit: Callable[[dict[str, Tensor]], object], named: str, tmp_path: Path
) -> None:
    folder = save_reference(make_reference(*CASES["qwen3 moe"]), tmp_path)
    edit_tensors(folder, edit)
    with pytest.raises(UnsupportedModel, match=named):
        load(folder)


def test_more_ranks_than_kv_heads_are_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"2 units .* 3 ranks"):
        load_ranks(folder, 3)


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 5), st.integers(0, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_slices_cover_every_unit_once(num_units: int, size: int, unit: int, gap: int, data: st.DataObject) -> None:
    size = min(size, num_units)
    start = data.draw(st.integers(0, 4))
    pitch = unit + gap
    piece = Piece(
        tensor="t",
        tensor_shape=(start + num_units * pitch, 2),
        sharding=Shard(0, unit),
        num_units=num_units,
        start=start,
        pitch=pitch,
    )
    slices = [piece.slices(Rank(index, size)) for index in range(size)]
    rows = [row for parts in slices for part in parts for row in range(part.start, part.stop)]
    assert rows == [start + u * pitch + i for u in range(num_units) for i in range(unit)]
    lens = [piece.shape(Rank(index, size))[0] for index in range(size)]
    assert max(lens) - min(lens) <= unit


def test_computed_buffers_and_a_tied_head_may_lie_about(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(folder, add)
    assert load(folder)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight.*\[3\].*\[64\]"),
        (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}), "self_attn.q_norm"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "model.norm.weight.*I8"),
    ],
    ids=["missing", "missing head", "misshapen", "left over", "quantised"],
)
def test_wrong_tensors_are_refused_by_name_before_anything_is_allocated(
    folder: Path, edit: Callable[[dict[str, Tensor]], object], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_tensors(folder, edit)
    monkeypatch.setattr(torch, "empty", lambda *_args, **_kwargs: pytest.fail("allocated"))
    with pytest.raises(UnsupportedModel, match=named):
        load(folder)


def rewrite(folder: Path, change: Callable[[bytes], bytes]) -> None:
    file = folder / WEIGHTS
    file.write_bytes(change(file.read_bytes()))


def with_header(data: bytes, header: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-100],
        lambda data: data[:20],
        lambda data: data[:5],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: with_header(data, b"{not json"),
        lambda data: with_header(data, b"[1]"),
        lambda data: with_header(data, b'{"a": {"dtype": "F32"}}'),
        lambda data: with_header(data, b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}'),
        lambda data: with_header(data, b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}'),
        lambda data: with_header(data, b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}'),
        lambda data: with_header(data, b'{"a": 1}'),
    ],
)
def test_damaged_files_are_refused_by_path(folder: Path, change: Callable[[bytes], bytes]) -> None:
    rewrite(folder, change)
    with pytest.raises(UnsupportedModel, match=WEIGHTS):
        load(folder)


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": {}}', "{", "[]"])
def test_a_foreign_index_is_refused(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors\.index\.json"):
        load(folder)


def test_a_folder_without_safetensors_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(UnsupportedModel, match="safetensors"):
        load(folder)


def test_a_context_beyond_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(StartupFailed, match="--max-model-len"):
        load_decoder(folder, dtype=torch.float32, device=CPU, max_model_len=513)


def test_the_tiny_model_is_the_same_every_time(tmp_path: Path) -> None:
    first, second, other = (
        make_tiny_model(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
    assert (first / WEIGHTS).read_bytes() != (other / WEIGHTS).read_bytes()
