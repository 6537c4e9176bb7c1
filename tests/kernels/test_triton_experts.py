"""What the proofs of `route` and `experts` do not say: the tiles of any choices, and logits that are not numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd_kernels.experts import triton_ops as experts_ops
from llmd_kernels.route import triton_ops as route_ops
from tests.kernels.proof.inputs import randn
from tests.kernels.proof.interpreter import interpreted


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
