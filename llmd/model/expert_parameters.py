"""The tensors of a mixture of experts, and how they are cut over ranks. Pure: shapes only.

Every rank has a part of every expert, cut by the intermediate size as an ordinary MLP is, so that all ranks have the
same work whichever experts are chosen.
"""

from collections.abc import Iterator

from llmd.model.family import TensorNames
from llmd.model.gated_mlp_parameters import gated_mlp_parameters, mlp_unit
from llmd.model.moe_spec import MoeSpec
from llmd.model.parallel import ExpertView, Parameter, Piece, Shard, split, whole


def expert_parameters(
    moe: MoeSpec, names: TensorNames, here: str, there: str, *, hidden_size: int, longest_group: int
) -> Iterator[Parameter]:
    """Of the layer whose parts are called `here`.… in the decoder and `there`.… in the checkpoint.

    longest_group: of inputs of quantised weights that share a scale.
    """
    router = whole(f"{there}.{names.router}.weight", moe.num_experts, hidden_size)
    yield Parameter(f"{here}.router.weight", (router,), in_float32=moe.router_in_float32)
    if moe.router_bias:
        yield Parameter(f"{here}.router.bias", (whole(f"{there}.{names.router}.bias", moe.num_experts),))
    if moe.choice_bias:
        # the scores that it is added to lie so close together that 16 bits would change the choice
        choice_bias = whole(f"{there}.{names.choice_bias}", moe.num_experts)
        yield Parameter(f"{here}.choice_bias", (choice_bias,), in_float32=True)
    if "{expert}" in names.expert_down:
        yield from _separate_experts(moe, names, here, there, hidden_size, longest_group)
    else:
        yield from _stacked_experts(moe, names, here, there, hidden_size)
    if moe.shared_size:
        yield from gated_mlp_parameters(
            f"{here}.shared",
            gate_up=tuple(f"{there}.{name}" for name in names.shared_gate_up),
            down=f"{there}.{names.shared_down}",
            hidden_size=hidden_size,
            size=moe.shared_size,
            unit=mlp_unit(moe.shared_size, longest_group),
        )
    if moe.shared_gate:
        yield Parameter(f"{here}.shared_gate.weight", (whole(f"{there}.{names.shared_gate}.weight", 1, hidden_size),))


def _separate_experts(
    moe: MoeSpec, names: TensorNames, here: str, there: str, hidden_size: int, longest_group: int
) -> Iterator[Parameter]:
    """From one tensor for each matrix of each expert."""
    size, unit = moe.expert_size, mlp_unit(moe.expert_size, longest_group)

    def matrix(name: str, expert: int) -> str:
        return f"{there}.{name.format(expert=expert)}.weight"

    experts = range(moe.num_experts)
    gate_up = tuple(
        split(matrix(name, expert), size, hidden_size, dim=0, unit=unit)
        for expert in experts
        for name in names.expert_gate_up
    )
    down = tuple(split(matrix(names.expert_down, expert), hidden_size, size, dim=1, unit=unit) for expert in experts)
    yield Parameter(f"{here}.experts.gate_up.weight", gate_up, num_experts=moe.num_experts)
    yield Parameter(f"{here}.experts.down.weight", down, num_experts=moe.num_experts)


def _stacked_experts(moe: MoeSpec, names: TensorNames, here: str, there: str, hidden_size: int) -> Iterator[Parameter]:
    """From one tensor for all experts, in which the gates' and the ups' rows alternate."""
    size, num_experts = moe.expert_size, moe.num_experts
    (gate_up_name,) = names.expert_gate_up
    gate_up, down = f"{there}.{gate_up_name}", f"{there}.{names.expert_down}"
    gate_up_pieces = _stack(moe, gate_up, (size, hidden_size), dim=0, num_alternating=2)
    yield Parameter(f"{here}.experts.gate_up.weight", gate_up_pieces, num_experts=num_experts)
    if moe.expert_bias:
        bias_pieces = _stack(moe, f"{gate_up}_bias", (size,), dim=0, num_alternating=2)
        yield Parameter(f"{here}.experts.gate_up.bias", bias_pieces, num_experts=num_experts)
    down_pieces = _stack(moe, down, (hidden_size, size), dim=1)
    yield Parameter(f"{here}.experts.down.weight", down_pieces, num_experts=num_experts)
    if moe.expert_bias:
        yield Parameter(f"{here}.experts.down.bias", (whole(f"{down}_bias", num_experts, hidden_size),))


def _stack(
    moe: MoeSpec, tensor: str, shape: tuple[int, ...], *, dim: int, num_alternating: int = 1
) -> tuple[Piece, ...]:
    """The matrices or biases of this shape, expert by expert; of each expert as many as there are alternating.

    A plain matrix is kept transposed, one in MXFP4 is not.
    """
    is_matrix = len(shape) == 2
    transposed = is_matrix and not moe.mxfp4
    stored = (num_alternating * shape[0], *shape[1:])
    unit = mlp_unit(moe.expert_size, longest_group=1)
    return tuple(
        Piece(
            tensor=tensor,
            tensor_shape=(moe.num_experts, *(reversed(stored) if transposed else stored)),
            sharding=Shard(dim, unit),
            num_units=moe.expert_size // unit,
            pitch=unit,
            view=ExpertView(
                expert=expert,
                shape=shape,
                transposed=transposed,
                first_row=row,
                row_step=num_alternating,
                mxfp4=is_matrix and moe.mxfp4,
            ),
        )
        for expert in range(moe.num_experts)
        for row in range(num_alternating)
    )
