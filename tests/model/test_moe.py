"""The layer around the kernels of a mixture of experts."""

import torch

from llmd.model.layers import GatedMlp, Linear
from llmd.model.moe import Moe
from llmd.model.moe_spec import MoeSpec

HIDDEN_SIZE, EXPERT_SIZE, NUM_EXPERTS = 8, 6, 4
SPEC = MoeSpec(
    num_experts=NUM_EXPERTS, num_chosen=2, expert_size=EXPERT_SIZE, activation="silu", expert_bias=False,
    scoring="softmax", renormalize=True, scale=1.0, router_bias=False, router_in_float32=True, choice_bias=False,
    num_groups=1, num_chosen_groups=1, group_score="max", shared_size=EXPERT_SIZE, shared_gate=False, mxfp4=False,
)  # fmt: skip


def test_padding_goes_to_no_expert() -> None:
    """The experts' weights are no numbers: whoever reads them, shows it."""
    generator = torch.Generator().manual_seed(0)

    def linear(num_outputs: int, num_inputs: int) -> Linear:
        return Linear(torch.randn(num_outputs, num_inputs, generator=generator), None)

    shared = GatedMlp(linear(2 * EXPERT_SIZE, HIDDEN_SIZE), linear(HIDDEN_SIZE, EXPERT_SIZE), "silu")
    moe = Moe(
        spec=SPEC,
        router=linear(NUM_EXPERTS, HIDDEN_SIZE),
        choice_bias=None,
        gate_up=torch.ones(NUM_EXPERTS, 2 * EXPERT_SIZE, HIDDEN_SIZE),
        gate_up_bias=None,
        down=torch.full((NUM_EXPERTS, HIDDEN_SIZE, EXPERT_SIZE), torch.nan),
        down_bias=None,
        shared=shared,
        shared_gate=None,
    )
    x = torch.randn(3, HIDDEN_SIZE, generator=generator)
    y = moe(x, slots=torch.tensor([4, -1, 0]))
    assert y.isnan().all(dim=1).tolist() == [True, False, True]
    assert torch.equal(y[1], shared(x)[1])
