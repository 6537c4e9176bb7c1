"""Which tensors a quantised weight consists of in a checkpoint, and what it will take here. Pure: shapes only.

Sources: AutoAWQ (awq/modules/linear/gemm.py, awq/utils/packing_utils.py), GPTQModel (nn_modules/qlinear),
compressed-tensors (compressors/pack_quantized, naive_quantized), transformers (integrations/finegrained_fp8.py,
fbgemm_fp8.py); each compared with what vLLM reads.
"""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from llmd.errors import UnsupportedModel
from llmd.model.parallel import ONE_RANK, Parameter, Piece, Rank, Shard
from llmd.model.quantization import MXFP4, Layout, QuantizationSpec, WeightScheme

WORD_BITS = 32
SCALE_DTYPES = ("F16", "BF16", "F32")
FLOAT8_SCALE_BYTES = 4
EXPONENT_BYTES = 1  # of MXFP4
ORDER_BYTES = 8  # of an input's number

# Of outputs and of inputs: how `llmd_kernels.IntWeight` and `Float4Weight` fill up their tiles
KERNEL_TILE = 64
# What the kernels ask of groups of inputs with one scale
GROUP_MULTIPLE, FLOAT8_GROUP_MULTIPLE = 32, 64

# Beside a quantised weight there may be figures about activations and caches, and shapes that config.json implies
UNREAD = (
    "activation_scale", "input_global_scale", "input_scale", "input_scale_ub", "input_zero_point", "k_scale",
    "kv_scale", "output_scale", "output_zero_point", "q_scale", "qzeros", "v_scale", "weight_g_idx", "weight_shape",
    "weight_zero_point",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Axis:
    """How one dimension of a stored tensor follows a dimension of the weight."""

    of: Literal["outputs", "inputs"]
    per: int | None = 1  # rows or columns of the weight that one number is for; None = all
    packed: bool = False  # numbers lie in words of 32 bits

    def step(self, bits: int) -> int | None:
        """Rows or columns of the weight that one entry is for."""
        return self.per and self.per * (WORD_BITS // bits if self.packed else 1)

    def length(self, size: int, bits: int) -> int:
        """Entries for a weight with so many rows or columns."""
        step = self.step(bits)
        return 1 if step is None else -(-size // step)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """One tensor of a quantised weight. `names`: what it may be called after the module's name."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    axes: tuple[Axis, ...]

    def shape(self, weight_shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
        num_outputs, num_inputs = weight_shape
        return tuple(axis.length(num_outputs if axis.of == "outputs" else num_inputs, bits) for axis in self.axes)

    def name(self, module: str, stored: Container[str]) -> str:
        """What it is called in this checkpoint; the first of its names where it is not there."""
        names = [f"{module}.{name}" for name in self.names]
        return next((name for name in names if name in stored), names[0])

    def axis(self, of: Literal["outputs", "inputs"]) -> Axis:
        """Its dimension along the weight's outputs or inputs."""
        return next(axis for axis in self.axes if axis.of == of)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """All tensors of a quantised weight."""

    values: StoredPart
    scales: StoredPart
    zeros: StoredPart | None  # None: symmetric
    groups: StoredPart | None  # which group an input belongs to; may be absent where inputs are not shuffled

    def parts(self) -> tuple[StoredPart, ...]:
        return tuple(part for part in (self.values, self.scales, self.zeros, self.groups) if part is not None)


def stored_weight(scheme: WeightScheme) -> StoredWeight:
    """What the checkpoint has instead of one weight."""
    weight = LAYOUTS[scheme.layout](scheme)
    return replace(weight, zeros=None) if scheme.symmetric else weight


def _awq(scheme: WeightScheme) -> StoredWeight:
    inputs, group = Axis("inputs"), Axis("inputs", scheme.block[1])
    packed = Axis("outputs", packed=True)
    return StoredWeight(
        values=StoredPart(names=("qweight",), dtypes=("I32",), axes=(inputs, packed)),
        scales=StoredPart(names=("scales",), dtypes=SCALE_DTYPES, axes=(group, Axis("outputs"))),
        zeros=StoredPart(names=("qzeros",), dtypes=("I32",), axes=(group, packed)),
        groups=None,
    )


def _gptq(scheme: WeightScheme) -> StoredWeight:
    inputs, group = Axis("inputs", packed=True), Axis("inputs", scheme.block[1])
    return StoredWeight(
        values=StoredPart(names=("qweight",), dtypes=("I32",), axes=(inputs, Axis("outputs"))),
        scales=StoredPart(names=("scales",), dtypes=SCALE_DTYPES, axes=(group, Axis("outputs"))),
        # symmetric ones have them too, but some writers of the first version store them as in the second
        zeros=StoredPart(names=("qzeros",), dtypes=("I32",), axes=(group, Axis("outputs", packed=True))),
        groups=StoredPart(names=("g_idx",), dtypes=("I32", "I64"), axes=(Axis("inputs"),)),
    )


def _packed(scheme: WeightScheme) -> StoredWeight:
    packed_outputs = Axis("outputs", packed=True)
    return StoredWeight(
        values=StoredPart(
            names=("weight_packed",), dtypes=("I32",), axes=(Axis("outputs"), Axis("inputs", packed=True))
        ),
        scales=_scales(scheme, "weight_scale"),
        zeros=StoredPart(
            names=("weight_zero_point",), dtypes=("I32",), axes=(packed_outputs, Axis("inputs", scheme.block[1]))
        ),
        groups=StoredPart(names=("weight_g_idx",), dtypes=("I32", "I64"), axes=(Axis("inputs"),)),
    )


def _int8(scheme: WeightScheme) -> StoredWeight:
    outputs, inputs = scheme.block
    return StoredWeight(
        values=StoredPart(names=("weight",), dtypes=("I8",), axes=(Axis("outputs"), Axis("inputs"))),
        scales=_scales(scheme, "weight_scale"),
        zeros=StoredPart(
            names=("weight_zero_point",), dtypes=("I8",), axes=(Axis("outputs", outputs), Axis("inputs", inputs))
        ),
        groups=StoredPart(names=("weight_g_idx",), dtypes=("I32", "I64"), axes=(Axis("inputs"),)),
    )


def _float8(scheme: WeightScheme) -> StoredWeight:
    return StoredWeight(
        values=StoredPart(names=("weight",), dtypes=("F8_E4M3",), axes=(Axis("outputs"), Axis("inputs"))),
        # both are what the values are multiplied by
        scales=_scales(scheme, "weight_scale_inv", "weight_scale"),
        zeros=None,
        groups=None,
    )


def _scales(scheme: WeightScheme, *names: str) -> StoredPart:
    outputs, inputs = scheme.block
    return StoredPart(names=names, dtypes=SCALE_DTYPES, axes=(Axis("outputs", outputs), Axis("inputs", inputs)))


# MXFP4 is not among them: its two tensors have all experts in them (`Piece.tensors`).
LAYOUTS: dict[Layout, Callable[[WeightScheme], StoredWeight]] = {
    "awq": _awq,
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "packed": _packed,
    "int8": _int8,
    "float8": _float8,
}


def module_of(piece: Piece) -> str:
    """The linear layer whose weight this is."""
    return piece.tensor.removesuffix(".weight")


def piece_scheme(parameter: Parameter, piece: Piece, quantization: QuantizationSpec | None) -> WeightScheme | None:
    """How the checkpoint keeps this piece; None = as plain numbers, as norms, biases and embeddings always are."""
    if piece.is_mxfp4:
        return MXFP4
    is_linear = len(piece.tensor_shape) == 2 and piece.tensor.endswith(".weight") and parameter.name != "embedding"
    return quantization.scheme(module_of(piece)) if quantization is not None and is_linear else None


def has_quantized_kernels(*, on_cpu: bool, dtype_bytes: int) -> bool:
    """Whether products with quantised weights are fast there; if not, weights are dequantised once, at load."""
    return not on_cpu and dtype_bytes == 2


def kept_parameters(
    parameters: Iterable[Parameter], quantization: QuantizationSpec | None
) -> dict[str, tuple[Parameter, WeightScheme]]:
    """By name, the parameters that stay quantised where there are kernels, and how."""
    kept = {parameter.name: (parameter, kept_scheme(parameter, quantization)) for parameter in parameters}
    return {name: (parameter, scheme) for name, (parameter, scheme) in kept.items() if scheme is not None}


def kept_scheme(parameter: Parameter, quantization: QuantizationSpec | None) -> WeightScheme | None:
    """How this parameter can stay quantised here; None = it is dequantised, if it is quantised at all.

    All its pieces must be alike, in groups that the kernels know; the experts of a stack have no order of inputs, and
    float8 numbers come in pairs (ranks have an even number of inputs wherever the whole has).
    """
    schemes = {piece_scheme(parameter, piece, quantization) for piece in parameter.pieces}
    scheme = schemes.pop()
    if scheme is None or schemes or (scheme.shuffled and parameter.num_experts is not None):
        return None
    if scheme.layout == "float8" and parameter.matrix_shape(ONE_RANK)[1] % 2:
        return None
    group = scheme.block[1]
    multiple = FLOAT8_GROUP_MULTIPLE if scheme.layout == "float8" else GROUP_MULTIPLE
    return scheme if group is None or group % multiple == 0 else None


def cuts(piece: Piece, rank: Rank) -> tuple[list[slice], list[slice]]:
    """The rows (outputs) and the columns (inputs) of the weight that this rank needs; one of the two is whole."""
    num_outputs, num_inputs = piece.matrix_shape
    slices = piece.slices(rank)
    if isinstance(piece.sharding, Shard) and piece.sharding.dim == 1:
        return [slice(0, num_outputs)], slices
    return slices, [slice(0, num_inputs)]


def entries(axis: Axis, cut: slice, size: int, *, bits: int, tensor: str) -> slice:
    """The entries of a stored tensor for these rows or columns of `size`. Raises UnsupportedModel inside of a group."""
    step = axis.step(bits)
    if step is None:
        return slice(0, 1)
    if cut.start % step or (cut.stop % step and cut.stop != size):
        raise UnsupportedModel(
            f"{tensor} cannot be split over these ranks: {axis.of} {cut.start} to {cut.stop} are not whole groups of "
            f"{step}. Use fewer ranks"
        )
    return slice(cut.start // step, -(-cut.stop // step))


def float8_block(parameter: Parameter, scheme: WeightScheme, rank: Rank) -> tuple[int, int]:
    """Outputs × inputs that share a scale once the pieces are joined: rows by themselves where blocks do not meet.

    No block holds rows of two pieces, so neither of two experts nor of a gate and an up.
    """
    _, num_inputs = parameter.matrix_shape(rank)
    outputs, inputs = scheme.block[0] or 1, scheme.block[1] or num_inputs
    ends = [0]
    for piece in parameter.pieces:
        for cut in cuts(piece, rank)[0]:
            if cut.start % outputs or ends[-1] % outputs:
                return 1, inputs
            ends.append(ends[-1] + cut.stop - cut.start)
    return outputs, inputs


def kept_bytes(parameter: Parameter, scheme: WeightScheme, rank: Rank, *, dtype_bytes: int) -> int:
    """What the parameter takes in the kernels' own layout; a stack is one weight with all experts' outputs."""
    num_outputs, num_inputs = parameter.matrix_shape(rank)
    if scheme.layout == "float8":
        outputs, inputs = float8_block(parameter, scheme, rank)
        return num_outputs * num_inputs + FLOAT8_SCALE_BYTES * -(-num_outputs // outputs) * -(-num_inputs // inputs)
    tiled = _filled(num_outputs) * _filled(num_inputs)
    num_groups = num_inputs // (scheme.block[1] or num_inputs)
    # an exponent; or a word with a scale of 16 bits and its zero point, or a word each
    per_group = EXPONENT_BYTES if scheme.layout == "mxfp4" else 2 * dtype_bytes
    order = ORDER_BYTES * num_inputs if scheme.shuffled else 0
    return tiled * scheme.bits // 8 + num_outputs * num_groups * per_group + order


def _filled(size: int) -> int:
    return -(-size // KERNEL_TILE) * KERNEL_TILE
