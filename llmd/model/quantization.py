"""How a checkpoint's weights are quantised, as data: which modules, in which layout. No tensors, no config files.

Weight-only: what a checkpoint says of quantised activations or caches plays no part (decision 0007).
"""

import re
from dataclasses import dataclass
from typing import Literal

from llmd.model.parallel import MXFP4_BLOCK

# How the integers or small floats of a weight lie in its tensors; quantized_layouts.py has the tensors of each.
#   awq         AutoAWQ's "gemm": words of eight 4-bit outputs, interleaved
#   gptq        AutoGPTQ: words of inputs; zero points are stored one too low ("v1")
#   gptq_v2     the same with zero points as they are
#   packed      compressed-tensors "pack-quantized": words of inputs
#   int8        compressed-tensors "int-quantized": signed bytes
#   float8      float8_e4m3fn with scales
#   mxfp4       gpt-oss's experts: blocks of codes, two a byte, and exponents (llmd_kernels.float4_numbers)
Layout = Literal["awq", "gptq", "gptq_v2", "packed", "int8", "float8", "mxfp4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """One way to keep the weight [num_outputs, num_inputs] of a linear layer.

    block: how many outputs × inputs share a scale; None = all of them.
    symmetric: the zero point is the middle of the range and is not read; always so for float8 and MXFP4.
    """

    layout: Layout
    bits: Literal[4, 8]
    block: tuple[int | None, int | None]
    symmetric: bool = True
    shuffled: bool = False  # inputs belong to groups in any order (GPTQ's desc_act), as a tensor says

    def describe(self) -> str:
        """For the operator: "awq, 4 bits, groups of 128 inputs"."""
        outputs, inputs = self.block
        if outputs not in (None, 1):
            scales = f"blocks of {outputs} × {inputs}"
        elif inputs is not None:
            scales = f"groups of {inputs} inputs"
        else:
            scales = "a scale for each output" if outputs == 1 else "one scale"
        return f"{self.layout}, {self.bits} bits, {scales}" + (", shuffled" if self.shuffled else "")


# What a tensor is that says so of itself (`ExpertView.mxfp4`): no rule is asked for it.
MXFP4 = WeightScheme(layout="mxfp4", bits=4, block=(1, MXFP4_BLOCK))


@dataclass(frozen=True, slots=True)
class ModulePattern:
    """Names of modules: "re:" and a regular expression for the beginning of the name, or a name, which also stands for
    everything inside of it and may leave out what is around it ("lm_head", "model.layers.3", "mlp.gate"). "*": all."""

    text: str

    def matches(self, module: str) -> bool:
        if self.text == "*":
            return True
        if self.text.startswith("re:"):
            return re.match(self.text.removeprefix("re:"), module) is not None
        # between dots, so that layers.1 is not layers.11 and mlp.gate not mlp.gate_proj
        return f".{self.text.strip('.')}." in f".{module}."


@dataclass(frozen=True, slots=True)
class QuantizationRule:
    """The modules that one of the patterns matches have this scheme; None = they are not quantised."""

    patterns: tuple[ModulePattern, ...]
    scheme: WeightScheme | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationSpec:
    """Which linear layers of a checkpoint are quantised, and how."""

    method: str  # as config.json calls it
    rules: tuple[QuantizationRule, ...]  # the first one that matches counts; without any a module is not quantised
    # of module names: as config.json may have them → as the spec has them (`Family.prefixes`)
    prefixes: tuple[tuple[str, str], ...] = ()

    def scheme(self, module: str) -> WeightScheme | None:
        """How this linear layer's weight is kept; None = as plain numbers."""
        names = [module]
        names += [found + module.removeprefix(called) for found, called in self.prefixes if module.startswith(called)]
        for rule in self.rules:
            if any(pattern.matches(name) for pattern in rule.patterns for name in names):
                return rule.scheme
        return None

    def schemes(self) -> tuple[WeightScheme, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys(rule.scheme for rule in self.rules if rule.scheme is not None))

    def longest_group(self) -> int:
        """Of inputs that share a scale; what shares all inputs does not count."""
        return max([scheme.block[1] or 1 for scheme in self.schemes()], default=1)
