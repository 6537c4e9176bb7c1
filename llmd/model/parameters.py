"""Every tensor of the decoder: its name there, where it comes from in a checkpoint, and how it is cut over ranks.

Pure: shapes only. Projections that read the same input are one parameter (q, k, v; gate, up), so that each is one
matrix product.
"""

from collections.abc import Iterator
from math import gcd

from llmd.model.expert_parameters import expert_parameters
from llmd.model.family import TensorNames
from llmd.model.gated_mlp_parameters import gated_mlp_parameters, mlp_unit
from llmd.model.parallel import Parameter, Piece, Shard, split, whole
from llmd.model.registry import FAMILIES
from llmd.model.spec import ModelSpec

# rows of the vocabulary that stay together on a rank, where they divide evenly
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
    yield from (_latent_attention if spec.latent else _attention)(spec, names, here, there)
    if spec.post_norm:
        name = f"{there}.{names.attention_output_norm}.weight"
        yield Parameter(f"{here}.attention_output_norm", (whole(name, hidden),))
    if spec.pre_norm:
        yield Parameter(f"{here}.mlp_norm", (whole(f"{there}.{names.mlp_norm}.weight", hidden),))
    moe = spec.layers[index].moe
    longest_group = spec.quantization.longest_group() if spec.quantization is not None else 1
    if moe is not None:
        yield from expert_parameters(moe, names, here, there, hidden_size=hidden, longest_group=longest_group)
    else:
        yield from gated_mlp_parameters(
            here,
            gate_up=tuple(f"{there}.{name}" for name in names.gate_up),
            down=f"{there}.{names.down}",
            hidden_size=hidden,
            size=spec.intermediate_size,
            unit=mlp_unit(spec.intermediate_size, longest_group),
            bias=spec.mlp_bias,
        )
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
    if spec.sinks:
        sinks = split(f"{there}.{names.sinks}", spec.num_heads, dim=0, unit=spec.num_heads // spec.num_kv_heads)
        yield Parameter(f"{here}.sinks", (sinks,))
    yield from _output(spec, f"{here}.o", f"{there}.{names.o}", value_size=spec.head_dim)


def _latent_attention(spec: ModelSpec, names: TensorNames, here: str, there: str) -> Iterator[Parameter]:
    """Every rank has the latents, and of what comes from them its heads."""
    latent = spec.latent
    assert latent is not None
    hidden, key_size = spec.hidden_size, latent.rope_dim + latent.nope_dim
    q_name, q_inputs = names.qkv[0], hidden
    if latent.q_rank is not None:
        q_name, q_inputs = names.q_b, latent.q_rank
        yield from _latent(spec, f"{here}.q_a", f"{there}.{names.q_a}", size=latent.q_rank)
        yield Parameter(f"{here}.q_a_norm", (whole(f"{there}.{names.q_a_norm}.weight", latent.q_rank),))
    q = split(f"{there}.{q_name}.weight", spec.num_heads * key_size, q_inputs, dim=0, unit=key_size)
    yield Parameter(f"{here}.q.weight", (q,))
    yield from _latent(spec, f"{here}.kv_a", f"{there}.{names.kv_a}", size=latent.kv_rank + latent.rope_dim)
    yield Parameter(f"{here}.kv_a_norm", (whole(f"{there}.{names.kv_a_norm}.weight", latent.kv_rank),))
    kv_size = latent.nope_dim + latent.v_dim
    kv_b = split(f"{there}.{names.kv_b}.weight", spec.num_heads * kv_size, latent.kv_rank, dim=0, unit=kv_size)
    yield Parameter(f"{here}.kv_b.weight", (kv_b,))
    yield from _output(spec, f"{here}.o", f"{there}.{names.o}", value_size=latent.v_dim)


def _latent(spec: ModelSpec, here: str, there: str, *, size: int) -> Iterator[Parameter]:
    yield Parameter(f"{here}.weight", (whole(f"{there}.weight", size, spec.hidden_size),))
    if spec.qkv_bias:
        yield Parameter(f"{here}.bias", (whole(f"{there}.bias", size),))


def _output(spec: ModelSpec, here: str, there: str, *, value_size: int) -> Iterator[Parameter]:
    """From all heads' values back to the residual stream."""
    group = spec.num_heads // spec.num_kv_heads * value_size
    weight = split(f"{there}.weight", spec.hidden_size, spec.num_heads * value_size, dim=1, unit=group)
    yield Parameter(f"{here}.weight", (weight,))
    if spec.o_bias:
        yield Parameter(f"{here}.bias", (whole(f"{there}.bias", spec.hidden_size),))


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
