"""The tensors of a gated MLP, and how they are cut over ranks. Pure: shapes only."""

from collections.abc import Iterator
from math import gcd, lcm

from llmd.model.parallel import Parameter, Piece, Shard, split, whole

# where they divide evenly
MLP_UNIT = 32


def mlp_unit(size: int, longest_group: int) -> int:
    """Columns of an intermediate size that stay together on a rank: whole groups of quantised ones (1: there are none)
    too, where those divide evenly."""
    unit = gcd(size, MLP_UNIT)
    whole_groups = lcm(unit, longest_group)
    return unit if size % whole_groups else whole_groups


def gated_mlp_parameters(
    here: str, *, gate_up: tuple[str, ...], down: str, hidden_size: int, size: int, unit: int, bias: bool = False
) -> Iterator[Parameter]:
    """`gate_up` and `down` below `here`.

    gate_up: the names of two tensors in the checkpoint, or of one that has both, one after the other; without
    `.weight` and `.bias`, as `down` is. unit: columns of the intermediate size that stay together on a rank.
    """
    yield Parameter(f"{here}.gate_up.weight", _gate_up(gate_up, "weight", size=size, unit=unit, columns=(hidden_size,)))
    if bias:
        yield Parameter(f"{here}.gate_up.bias", _gate_up(gate_up, "bias", size=size, unit=unit, columns=()))
    down_weight = split(f"{down}.weight", hidden_size, size, dim=1, unit=unit)
    yield Parameter(f"{here}.down.weight", (down_weight,))
    if bias:
        yield Parameter(f"{here}.down.bias", (whole(f"{down}.bias", hidden_size),))


def _gate_up(
    names: tuple[str, ...], kind: str, *, size: int, unit: int, columns: tuple[int, ...]
) -> tuple[Piece, Piece]:
    fused = len(names) == 1
    gate, up = (
        Piece(
            tensor=f"{names[i % len(names)]}.{kind}",
            tensor_shape=(2 * size if fused else size, *columns),
            sharding=Shard(0, unit),
            num_units=size // unit,
            start=i * size if fused else 0,
            pitch=unit,
        )
        for i in range(2)
    )
    return gate, up
