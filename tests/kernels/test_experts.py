"""`route` and `experts` against their references and against `transformers`; the same bits for any other rows."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from llmd_kernels import experts, route
from llmd_kernels.experts import reference as experts_reference
from llmd_kernels.route import reference as route_reference
from tests.kernels.conftest import threads

NUM_TOKENS = [0, 1, 7, 33]
# Mixtral's, Qwen3's, gpt-oss's, DeepSeek V2's and V3's way to choose, smaller where sorting in Python would take long.
ROUTERS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_experts": 8, "num_chosen": 2, "scoring": "softmax", "renormalize": True},
    "qwen3": {"num_experts": 128, "num_chosen": 8, "scoring": "softmax", "renormalize": True},
    "gpt-oss": {"num_experts": 32, "num_chosen": 4, "scoring": "softmax", "renormalize": True},
    "deepseek v2": {
        "num_experts": 40,
        "num_chosen": 6,
        "scoring": "softmax",
        "renormalize": False,
        "scale": 16.0,
        "num_groups": 8,
        "num_chosen_groups": 3,
    },
    "deepseek v3": {
        "num_experts": 64,
        "num_chosen": 8,
        "scoring": "sigmoid",
        "renormalize": True,
        "scale": 2.5,
        "num_groups": 8,
        "num_chosen_groups": 4,
        "group_score": "top2",
        "choice_bias": True,
    },
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def router(name: str) -> tuple[int, dict[str, Any]]:
    """(number of experts, the arguments of `route` after the logits)."""
    arguments = dict(ROUTERS[name])
    num_experts = arguments.pop("num_experts")
    if "choice_bias" in arguments:
        arguments["choice_bias"] = randn(num_experts, seed=5) * 0.1
    return num_experts, arguments


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("name", ROUTERS)
def test_route(name: str, num_tokens: int) -> None:
    num_experts, arguments = router(name)
    logits = randn(num_tokens, num_experts)
    expert_ids, weights = route(logits, **arguments)
    exact = {key: value.double() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    expected_ids, expected_weights = route_reference.route(logits.double(), **exact)
    assert (expert_ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert torch.equal(expert_ids, expected_ids)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=2e-6, atol=2e-6)


def test_padding_goes_to_no_expert() -> None:
    num_experts, arguments = router("mixtral")
    logits, slots = randn(5, num_experts), torch.tensor([7, -1, 0, -1, -1])
    expert_ids, weights = route(logits, slots=slots, **arguments)
    without = route(logits, **arguments)
    for result, truth in zip((expert_ids, weights), without, strict=True):
        assert torch.equal(result[slots >= 0], truth[slots >= 0])
    assert (expert_ids[slots < 0] == -1).all()
    assert not weights[slots < 0].any()


def test_of_equal_experts_the_lower_id_is_chosen_first() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0] * 5])
    expert_ids, _ = route(logits, num_chosen=3, scoring="softmax", renormalize=True)
    assert expert_ids.tolist() == [[1, 3, 0], [0, 1, 2]]


def test_logits_that_are_close_are_told_apart_although_their_scores_round_to_the_same() -> None:
    logits = torch.tensor([[30.0, 31.0, 29.0]])
    expert_ids, weights = route(logits, num_chosen=2, scoring="sigmoid", renormalize=False)
    assert expert_ids.tolist() == [[1, 0]]
    assert weights.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("name", ROUTERS)
def test_ids_are_valid_where_logits_are_not_numbers(name: str) -> None:
    num_experts, arguments = router(name)
    logits = randn(4, num_experts)
    logits[0] = torch.nan
    logits[1, ::2] = torch.nan
    logits[2] = -torch.inf
    logits[3, 1:] = torch.inf
    for ids in route(logits, **arguments)[0].tolist():
        assert len(set(ids)) == arguments["num_chosen"]
        assert all(0 <= expert < num_experts for expert in ids)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_groups": 3}, "8 experts cannot be cut into 3 equal groups"),
        ({"num_groups": 2, "num_chosen_groups": 3}, "3 of 2 groups"),
        ({"num_groups": 4, "num_chosen_groups": 1, "num_chosen": 3}, "3 experts cannot be chosen from 1 groups of 2"),
        ({"num_groups": 8, "num_chosen_groups": 8, "group_score": "top2"}, "no two best"),
        ({"num_chosen": 9}, "9 experts cannot be chosen"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(wrong: dict[str, Any], message: str) -> None:
    arguments = {"num_chosen": 2, "scoring": "softmax", "renormalize": True} | wrong
    with pytest.raises(ValueError, match=message):
        route(randn(2, 8), **arguments)


@pytest.mark.parametrize("name", ROUTERS)
def test_bits_of_a_route_do_not_depend_on_the_other_tokens(name: str) -> None:
    num_experts, arguments = router(name)
    logits = randn(263, num_experts)
    whole = route(logits, **arguments)
    for size in (1, 2, 3, 5, 8, 11, 31, 130):
        for start in (0, 1, 6, 17):
            part = slice(start, start + size)
            for result, truth in zip(route(logits[part], **arguments), whole, strict=True):
                assert torch.equal(result, truth[part]), (start, size)


Activation = Literal["silu", "gelu_tanh", "gelu", "clamped_silu"]


def layer(num_experts: int, hidden_size: int, intermediate_size: int, *, has_bias: bool) -> dict[str, Any]:
    """The weights and the activation of one layer."""
    biases = {
        "gate_up_bias": randn(num_experts, 2 * intermediate_size, seed=3),
        "down_bias": randn(num_experts, hidden_size, seed=4),
    }
    return {
        "gate_up": randn(num_experts, 2 * intermediate_size, hidden_size, seed=1) / hidden_size**0.5,
        "down": randn(num_experts, hidden_size, intermediate_size, seed=2) / intermediate_size**0.5,
        "activation": "clamped_silu" if has_bias else "silu",
    } | (biases if has_bias else {})


def choices(num_tokens: int, num_experts: int, num_chosen: int) -> tuple[Tensor, Tensor]:
    return route(randn(num_tokens, num_experts, seed=6), num_chosen=num_chosen, scoring="softmax", renormalize=True)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_experts(num_tokens: int, has_bias: bool) -> None:
    x, (expert_ids, weights) = randn(num_tokens, 33) * 3, choices(num_tokens, 6, 3)
    expert_ids[::5, 1] = -1
    arguments = layer(6, 33, 20, has_bias=has_bias)
    exact = {key: value.double() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    result = experts(x, expert_ids, weights, **arguments)
    expected = experts_reference.experts(x.double(), expert_ids, weights.double(), **exact)
    torch.testing.assert_close(result.double(), expected, rtol=2e-5, atol=2e-5)


def test_a_token_without_experts_is_zero() -> None:
    x, nobody = randn(2, 16), torch.full((2, 2), -1, dtype=torch.int32)
    assert not experts(x, nobody, torch.ones(2, 2), **layer(4, 16, 8, has_bias=True)).any()


@pytest.mark.parametrize("sizes", [(8, 576, 96, 2), (32, 256, 128, 4)], ids=str)
def test_bits_of_a_row_do_not_depend_on_the_others(sizes: tuple[int, int, int, int]) -> None:
    num_experts, hidden_size, intermediate_size, num_chosen = sizes
    arguments = layer(num_experts, hidden_size, intermediate_size, has_bias=True)
    x, (expert_ids, weights) = randn(131, hidden_size), choices(131, num_experts, num_chosen)
    whole = experts(x, expert_ids, weights, **arguments)
    for size in (1, 2, 3, 8, 11, 64, 130):
        for start in (0, 1):
            part = slice(start, start + size)
            assert torch.equal(experts(x[part], expert_ids[part], weights[part], **arguments), whole[part]), (
                start,
                size,
            )
    turned = torch.randperm(131, generator=torch.Generator().manual_seed(1))
    assert torch.equal(experts(x[turned], expert_ids[turned], weights[turned], **arguments), whole[turned])
    with threads(2):
        for size in (7, 119, 131):
            assert torch.equal(experts(x[:size], expert_ids[:size], weights[:size], **arguments), whole[:size]), size
