"""What the proofs of `route` and `experts` do not say: the tiles of any choices, and logits that are not numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd_kernels import QuantizedWeight, dequantized, experts
from llmd_kernels.experts import triton_ops as experts_ops
from llmd_kernels.route import triton_ops as route_ops
from tests.kernels.proof.inputs import randn
from tests.kernels.proof.interpreter import interpreted
from tests.kernels.proof.operations.experts import choices, quantized_stacks
from tests.kernels.proof.operations.quantized_linear import int_weight


@settings(max_examples=25, deadline=None)
@given(
    ids=st.lists(st.integers(-2, 6), min_size=1, max_size=300),
    columns=st.sampled_from([16, 32]),
    shuffle=st.integers(0, 3),
)
def test_each_choice_is_in_one_tile_of_its_expert(ids: list[int], columns: int, shuffle: int) -> None:
    expert_ids = torch.tensor(ids, dtype=torch.int32)[:, None]
    with interpreted(shuffle=shuffle):
        order, places, tiles = experts_ops.group(expert_ids, 5, columns)
    expected = sorted((expert, choice) for choice, expert in enumerate(ids) if 0 <= expert < 5)
    grouped = []
    for expert, first, end in tiles.T.tolist():
        assert (expert >= 0) == (first < end)
        assert end - first <= columns
        grouped += [(expert, choice) for choice in order[first:end].tolist()]
    assert grouped == expected
    where = {choice: place for place, (_, choice) in enumerate(expected)}
    assert places.tolist() == [where.get(choice, -1) for choice in range(len(ids))]


def test_more_choices_than_one_block_holds_are_grouped_in_order() -> None:
    expert_ids = torch.arange(2 * 2100, dtype=torch.int32).view(2100, 2) * 7 % 3
    with interpreted():
        order, places, tiles = experts_ops.group(expert_ids, 3, 64)
    expected = expert_ids.flatten().sort(stable=True).indices
    assert torch.equal(order, expected.int())
    assert torch.equal(places, expected.argsort().int())
    assert tiles[0].tolist() == [0] * 22 + [1] * 22 + [2] * 22 + [-1] * (tiles.shape[1] - 66)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sizes", "layer"), [pytest.param(*rest, id=name) for name, *rest in quantized_stacks()])
def test_bits_are_those_of_dequantised_stacks(
    sizes: tuple[int, int, int], layer: dict[str, QuantizedWeight], dtype: torch.dtype
) -> None:
    """For tiles of several widths."""
    num_experts, hidden_size, _ = sizes
    plain = {name: dequantized(each, dtype).view(num_experts, -1, each.num_inputs) for name, each in layer.items()}
    for num_tokens in (2, 30):
        x, chosen = randn(num_tokens, hidden_size, dtype=dtype), choices(num_tokens, num_experts, 2)
        with interpreted():
            y = experts_ops.experts(x, **chosen, **layer, activation="silu")
            assert torch.equal(y, experts_ops.experts(x, **chosen, **plain, activation="silu"))
        # the other way to the same numbers, without Triton
        expected = experts(x, **chosen, **layer, activation="silu")
        assert (y - expected).float().norm() <= 0.01 * expected.float().norm()


def test_a_stack_with_an_order_of_inputs_is_refused() -> None:
    gate_up = int_weight(4 * 64, 64, bits=4, num_groups=2, is_ordered=True)
    layer = {"gate_up": gate_up, "down": int_weight(4 * 64, 32, bits=4)}
    with interpreted(), pytest.raises(ValueError, match="inputs as they come"):
        experts_ops.experts(randn(2, 64).bfloat16(), **choices(2, 4, 2), **layer, activation="silu")


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.parametrize("num_groups", [1, 4])
def test_ids_are_valid_where_logits_are_not_numbers(num_groups: int) -> None:
    logits = randn(4, 16)
    logits[0] = torch.nan
    logits[1, ::2] = torch.nan
    logits[2] = -torch.inf
    logits[3, 1:] = torch.inf
    with interpreted():
        expert_ids, _ = route_ops.route(logits, 6, "sigmoid", True, num_groups=num_groups, num_chosen_groups=num_groups)
        within, _ = route_ops.route(logits, 6, "softmax", True, num_groups=4, num_chosen_groups=2)
    for ids in [*expert_ids.tolist(), *within.tolist()]:
        assert len(set(ids)) == 6
        assert all(0 <= expert < 16 for expert in ids)
