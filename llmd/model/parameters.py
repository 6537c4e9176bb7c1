"""Every tensor of the decoder: its name there, where it comes from in a checkpoint, and how it is cut over ranks.

Pure: shapes only. Projections that read the same input are one parameter (q, k, v; gate, up), so that each is one
matrix product.
"""

from collections.abc import Iterator
from math import gcd

from llmd.model.parallel import Parameter, Piece, Shard, split, whole
from llmd.model.registry import FAMILIES, TensorNames
from llmd.model.spec import ModelSpec

# columns of the MLP and rows of the vocabulary that stay together on a rank, where they divide evenly
MLP_UNIT = 32
VOCAB_UNIT = 64


def parameters(spec: ModelSpec) -> list[Parameter]:
    """All parameters, in the order of the forward pass. Without a `head` where the embedding serves as one."""
    names = FAMILIES[spec.architecture].names
    vocab = {"dim": 0, "unit": gcd(spec.vocab_size, VOCAB_UNIT)}
    result = [Parameter("embedding", (split(f"{names.embedding}.weight", spec.vocab_size, spec.hidden_size, **vocab),))]
    for index in range(len(spec.layers)):
        result += _layer(spec, names, index)
    result.append(Parameter("norm", (whole(f"{names.norm}.weight", spec.hidden_size),)))
    if not spec.tied_embeddings:
        result.append(Parameter("head", (split(f"{names.head}.weight", spec.vocab_size, spec.hidden_size, **vocab),)))
    return result


def _layer(spec: ModelSpec, names: TensorNames, index: int) -> Iterator[Parameter]:
    here, there = f"layers.{index}", names.layer.format(index=index)
    hidden = spec.hidden_size
    if spec.pre_norm:
        yield Parameter(f"{here}.attention_norm", (whole(f"{there}.{names.attention_norm}.weight", hidden),))
    yield from _attention(spec, names, here, there)
    if spec.post_norm:
        name = f"{there}.{names.attention_output_norm}.weight"
        yield Parameter(f"{here}.attention_output_norm", (whole(name, hidden),))
    if spec.pre_norm:
        yield Parameter(f"{here}.mlp_norm", (whole(f"{there}.{names.mlp_norm}.weight", hidden),))
    yield from _mlp(spec, names, here, there)
    if spec.post_norm:
        yield Parameter(f"{here}.mlp_output_norm", (whole(f"{there}.{names.mlp_output_norm}.weight", hidden),))


def _attention(spec: ModelSpec, names: TensorNames, here: str, there: str) -> Iterator[Parameter]:
    hidden, group = spec.hidden_size, spec.num_heads // spec.num_kv_heads * spec.head_dim
    yield Parameter(f"{here}.qkv.weight", _qkv(spec, names, there, "weight", columns=(hidden,)))
    if spec.qkv_bias:
        yield Parameter(f"{here}.qkv.bias", _qkv(spec, names, there, "bias", columns=()))
    if spec.qk_norm == "head":
        yield Parameter(f"{here}.q_norm", (whole(f"{there}.{names.q_norm}.weight", spec.head_dim),))
        yield Parameter(f"{here}.k_norm", (whole(f"{there}.{names.k_norm}.weight", spec.head_dim),))
    elif spec.qk_norm == "projection":
        q_size, k_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        q_norm = split(f"{there}.{names.q_norm}.weight", q_size, dim=0, unit=group)
        k_norm = split(f"{there}.{names.k_norm}.weight", k_size, dim=0, unit=spec.head_dim)
        yield Parameter(f"{here}.q_norm", (q_norm,))
        yield Parameter(f"{here}.k_norm", (k_norm,))
    o_name = f"{there}.{names.o}"
    o_weight = split(f"{o_name}.weight", hidden, spec.num_heads * spec.head_dim, dim=1, unit=group)
    yield Parameter(f"{here}.o.weight", (o_weight,))
    if spec.o_bias:
        yield Parameter(f"{here}.o.bias", (whole(f"{o_name}.bias", hidden),))


def _qkv(
    spec: ModelSpec, names: TensorNames, there: str, kind: str, *, columns: tuple[int, ...]
) -> tuple[Piece, Piece, Piece]:
    """The rows of queries, keys and values, cut by KV head, from whichever way the checkpoint keeps them."""
    head, units = spec.head_dim, spec.num_kv_heads
    group = spec.num_heads // spec.num_kv_heads * head
    sizes = (group, head, head)
    rows, starts, pitches = tuple(units * size for size in sizes), (0, 0, 0), sizes
    if len(names.qkv) == 1:
        rows = (units * sum(sizes),) * 3
        starts = (0, units * group, units * (group + head))
    if names.qkv_rows == "grouped":
        starts, pitches = (0, group, group + head), (sum(sizes),) * 3
    q, k, v = (
        Piece(
            tensor=f"{there}.{names.qkv[i % len(names.qkv)]}.{kind}",
            tensor_shape=(rows[i], *columns),
            sharding=Shard(0, sizes[i]),
            num_units=units,
            start=starts[i],
            pitch=pitches[i],
        )
        for i in range(3)
    )
    return q, k, v


def _mlp(spec: ModelSpec, names: TensorNames, here: str, there: str) -> Iterator[Parameter]:
    hidden, size = spec.hidden_size, spec.intermediate_size
    unit = gcd(size, MLP_UNIT)
    yield Parameter(f"{here}.gate_up.weight", _gate_up(names, there, "weight", size=size, columns=(hidden,)))
    if spec.mlp_bias:
        yield Parameter(f"{here}.gate_up.bias", _gate_up(names, there, "bias", size=size, columns=()))
    yield Parameter(f"{here}.down.weight", (split(f"{there}.{names.down}.weight", hidden, size, dim=1, unit=unit),))
    if spec.mlp_bias:
        yield Parameter(f"{here}.down.bias", (whole(f"{there}.{names.down}.bias", hidden),))


def _gate_up(names: TensorNames, there: str, kind: str, *, size: int, columns: tuple[int, ...]) -> tuple[Piece, Piece]:
    """The rows of gate and up, from two tensors or from one that has them one after the other."""
    unit = gcd(size, MLP_UNIT)
    fused = len(names.gate_up) == 1
    gate, up = (
        Piece(
            tensor=f"{there}.{names.gate_up[i % len(names.gate_up)]}.{kind}",
            tensor_shape=(2 * size if fused else size, *columns),
            sharding=Shard(0, unit),
            num_units=size // unit,
            start=i * size if fused else 0,
            pitch=unit,
        )
        for i in range(2)
    )
    return gate, up
