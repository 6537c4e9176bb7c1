"""The small parts of a layer: each is its weights and one call. They know no sequence, no cache, no family."""

from dataclasses import dataclass

from torch import Tensor

from llmd.model.spec import Activation
from llmd_kernels import QuantizedWeight, add_rms_norm, gated_mul, linear, rms_norm


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Tensor | QuantizedWeight  # [num_outputs, num_inputs], packed
    bias: Tensor | None  # [num_outputs]

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, num_inputs] → [num_tokens, num_outputs]."""
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class RmsNorm:
    weight: Tensor  # [size]
    eps: float
    weight_offset: float

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, size] → the same."""
        return rms_norm(x, self.weight, self.eps, weight_offset=self.weight_offset)


def add_and_norm(x: Tensor, residual: Tensor | None, norm: RmsNorm | None) -> tuple[Tensor, Tensor]:
    """The residual stream with x added (None: it starts with x), normed for the next operation → (normed, stream)."""
    if residual is None:
        return (x if norm is None else norm(x)), x
    if norm is None:
        residual = residual + x
        return residual, residual
    return add_rms_norm(x, residual, norm.weight, norm.eps, weight_offset=norm.weight_offset)


@dataclass(frozen=True, slots=True)
class GatedMlp:
    gate_up: Linear  # the gate's rows, then up's
    down: Linear
    activation: Activation

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, hidden_size] → the same."""
        return self.down(gated_mul(self.gate_up(x), self.activation))
