"""A mixture of experts in the place of the MLP: a router, the experts that it chooses, the one that all tokens have."""

from dataclasses import dataclass

from torch import Tensor

from llmd.model.layers import GatedMlp, Linear
from llmd.model.moe_spec import MoeSpec
from llmd_kernels import QuantizedWeight, experts, route


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    spec: MoeSpec
    router: Linear
    choice_bias: Tensor | None  # [num_experts] float32
    # [num_experts, 2 · expert_size, hidden_size], of each expert the gate's rows, then up's; quantised stacks, here and
    # below, are one weight: the experts' matrices one below the other
    gate_up: Tensor | QuantizedWeight
    gate_up_bias: Tensor | None  # [num_experts, 2 · expert_size]
    down: Tensor | QuantizedWeight  # [num_experts, hidden_size, expert_size]
    down_bias: Tensor | None  # [num_experts, hidden_size]
    shared: GatedMlp | None
    shared_gate: Linear | None  # one output: the sigmoid of it weighs what the shared expert gives

    def __call__(self, x: Tensor, slots: Tensor) -> Tensor:
        """[num_tokens, hidden_size] → the same. Tokens without a slot are padding, which goes to no expert."""
        spec = self.spec
        expert_ids, weights = route(
            self.router(x.float() if spec.router_in_float32 else x),
            num_chosen=spec.num_chosen,
            scoring=spec.scoring,
            renormalize=spec.renormalize,
            scale=spec.scale,
            choice_bias=self.choice_bias,
            num_groups=spec.num_groups,
            num_chosen_groups=spec.num_chosen_groups,
            group_score=spec.group_score,
            slots=slots,
        )
        y = experts(
            x,
            expert_ids,
            weights,
            self.gate_up,
            self.down,
            activation=spec.activation,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
        )
        if self.shared is None:
            return y
        shared = self.shared(x)
        if self.shared_gate is None:
            return y + shared
        # not torch.sigmoid: its last bit depends on where in a tensor a number stands (contract C3)
        weight = 1 / self.shared_gate(x).float().neg_().exp_().add_(1)
        return (y + weight * shared).to(x.dtype)
