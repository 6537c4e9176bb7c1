"""`experts` in Triton, in four launches: group the choices by expert, gate and up, down, add up the chosen.

A choice is a pair (token, expert), numbered t · C + c. Its numbers are computed as `linear` computes them: weights are
the matrix units' rows, choices their columns, every output one chain over K in blocks of BLOCK_K in rising order. So
its bits depend neither on which other choices share its tile nor on how wide the tile is. Quantised stacks are unpacked
as `quantized_linear` unpacks a weight.

How many choices an expert has only the device knows. Grids are bounds: programs beyond the last tile end at once.
"""

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.experts.torch_ops import count_experts, stacked
from llmd_kernels.experts.triton_group import group
from llmd_kernels.gated_mul.triton_ops import gated
from llmd_kernels.linear.triton_ops import BLOCK_K, span_sum, tile_of
from llmd_kernels.quantized_linear.triton_unpack import has_kernel, operands, rows_of, step
from llmd_kernels.quantized_linear.triton_unpack import span_sum as quantized_sum
from llmd_kernels.quantized_linear.weights import IntWeight, QuantizedWeight
from llmd_kernels.target import at_most, is_nvidia, of_one_depth, target_kind

# Tiles of choices that are computed side by side for one tile of outputs, to share what the cache holds.
GROUP = 8


def experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    activation: Literal["silu", "gelu_tanh", "gelu", "clamped_silu"],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Products and their weighted sum in float32; rounded are gated_mul's results and, once, what is returned."""
    num_tokens, hidden_size = x.shape
    num_experts, num_chosen = count_experts(down, hidden_size), expert_ids.shape[1]
    num_choices = num_tokens * num_chosen
    y = torch.empty(num_tokens, hidden_size, dtype=x.dtype, device=x.device)
    if num_choices == 0:
        return y.zero_()
    x = x if x.stride(1) == 1 else x.contiguous()
    expert_ids, weights = expert_ids.contiguous(), weights.contiguous()
    columns = tile_columns(num_choices, num_experts, itemsize=x.itemsize)
    order, places, tiles = group(expert_ids, num_experts, columns)
    num_tiles = tiles.shape[1]

    intermediate_size = down.shape[2] if isinstance(down, Tensor) else down.num_inputs
    inner = torch.empty(num_choices, intermediate_size, dtype=x.dtype, device=x.device)
    stack = operands_of(gate_up, num_experts, x.dtype)
    outputs, num_warps, num_stages = gate_up_tile(columns, itemsize=x.itemsize)
    gate_up_kernel[(num_tiles * triton.cdiv(intermediate_size, outputs),)](
        x,
        gate_up_bias,
        order,
        tiles,
        inner,
        num_tiles,
        intermediate_size,
        x.stride(0),
        **stack,
        NUM_CHOSEN=num_chosen,
        K=hidden_size,
        STEP=step(hidden_size, hidden_size, stack["SCALE_INPUTS"]),
        ACTIVATION=activation,
        OUTPUTS=outputs,
        COLUMNS=columns,
        BLOCK=BLOCK_K,
        GROUP_SIZE=GROUP,
        num_warps=num_warps,
        **compiling(stack, columns, num_stages),
    )
    chosen_y = torch.empty(num_choices, hidden_size, dtype=torch.float32, device=x.device)
    stack = operands_of(down, num_experts, x.dtype)
    outputs, num_warps, num_stages = down_tile(columns, itemsize=x.itemsize)
    down_kernel[(num_tiles * triton.cdiv(hidden_size, outputs),)](
        inner,
        down_bias,
        tiles,
        chosen_y,
        num_tiles,
        hidden_size,
        **stack,
        K=intermediate_size,
        STEP=step(intermediate_size, intermediate_size, stack["SCALE_INPUTS"]),
        OUTPUTS=outputs,
        COLUMNS=columns,
        BLOCK=BLOCK_K,
        GROUP_SIZE=GROUP,
        num_warps=num_warps,
        **compiling(stack, columns, num_stages),
    )
    add_chosen_kernel[(num_tokens, triton.cdiv(hidden_size, 1024))](
        chosen_y, places, weights, y, hidden_size, NUM_CHOSEN=num_chosen, BLOCK=1024, num_warps=2
    )
    return y


def operands_of(stack: Tensor | QuantizedWeight, num_experts: int, dtype: torch.dtype) -> dict[str, Any]:
    """What both kernels must know of it. Stacks of numbers have no scales."""
    if isinstance(stack, IntWeight) and stack.input_order is not None:
        raise ValueError("a stack of experts has its inputs as they come")
    if not isinstance(stack, Tensor) and has_kernel(stack) and dtype.itemsize == 2:
        return operands(stack)
    return {
        "weights": stacked(stack, num_experts, dtype).contiguous(),
        "scales": None,
        "weight_stride": 0,
        "scale_stride": 0,
        "group_stride": 0,
        "KIND": "numbers",
        "SCALE_DTYPE": tl.float32,
        "SCALE_OUTPUTS": 1,
        "SCALE_INPUTS": BLOCK_K,
    }


def tile_columns(num_choices: int, num_experts: int, *, itemsize: int = 2) -> int:
    """Choices of a tile: twice an expert's share, so that most experts' weights are read once. No bit depends on it."""
    # No matrix instruction of NVIDIA's multiplies float32 whole: more columns would spill, or fewer warps.
    most = 32 if itemsize == 4 else 128
    return min(max(16, int(triton.next_power_of_2(triton.cdiv(2 * num_choices, num_experts)))), most)


def gate_up_tile(columns: int, *, itemsize: int = 2) -> tuple[int, int, int]:
    """(outputs, each of a gate and an up; warps; stages). 64 rows are the least that Hopper's matrix units take."""
    if itemsize == 4:
        return 32, 8, 3
    return (64, 4, 4 if columns <= 32 else 3) if columns <= 64 else (64, 8, 3)


def down_tile(columns: int, *, itemsize: int = 2) -> tuple[int, int, int]:
    """(outputs, warps, stages)."""
    if itemsize == 4:
        return 64, 8, 3
    return (64, 4, 5) if columns <= 64 else (128, 8, 3)


def compiling(stack: dict[str, Any], columns: int, num_stages: int) -> dict[str, int]:
    """The pipeline's stages, and what else compilers are told."""
    kind = target_kind()
    if stack["KIND"] == "numbers" or kind is None:
        return {"num_stages": num_stages, **of_one_depth()}
    # AMD's compiler fails on deeper pipelines where weights are computed with before they are multiplied.
    num_stages = num_stages if is_nvidia(kind) else 2
    # Narrow tiles do not spill, and would be given more registers than they need.
    return {"num_stages": num_stages, **of_one_depth(), **(at_most(255) if columns > 16 else {})}


@triton.jit(do_not_specialize=["max_tiles"])
def gate_up_kernel(
    x,
    bias,
    order,
    tiles,
    inner,
    max_tiles,
    num_outputs,
    x_stride,
    weights,
    scales,
    weight_stride,
    scale_stride,
    group_stride,
    KIND: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SCALE_OUTPUTS: tl.constexpr,
    SCALE_INPUTS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    K: tl.constexpr,
    STEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """x [T, K], weights [E, 2·I, K] → inner [T·C, I] in the order of `order`. Grid: (tiles · tiles of outputs,)."""
    output_tile, tile = tile_of(tl.program_id(0), tl.cdiv(num_outputs, OUTPUTS), max_tiles, GROUP_SIZE)
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    first, end = tl.load(tiles + max_tiles + tile), tl.load(tiles + 2 * max_tiles + tile)
    places = first + tl.arange(0, COLUMNS)
    outputs = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    # Rows and columns beyond the end read the last one: they are not stored, and loads without a mask stay wide.
    tokens = tl.load(order + tl.minimum(places, end - 1)) // NUM_CHOSEN
    x_rows = x + tokens.to(tl.int64)[None, :] * x_stride
    rows = tl.minimum(outputs, num_outputs - 1)
    if KIND == "numbers":
        gate_rows = weights + expert.to(tl.int64) * (2 * num_outputs) * K
        gate_rows += rows.to(tl.int64)[:, None] * K
        up_rows = gate_rows + num_outputs.to(tl.int64) * K
        gate, up = two_sums(gate_rows, up_rows, x_rows, K, OUTPUTS, COLUMNS, BLOCK)
    else:
        rows += expert * (2 * num_outputs)
        # One after the other: columns of x are read again, from the cache, and registers are left for unpacking.
        gate = stack_sum(
            weights, scales, rows, x_rows, weight_stride, scale_stride, group_stride,
            KIND, SCALE_DTYPE, SCALE_OUTPUTS, SCALE_INPUTS, K, STEP, OUTPUTS, COLUMNS, BLOCK,
        )  # fmt: skip
        up = stack_sum(
            weights, scales, rows + num_outputs, x_rows, weight_stride, scale_stride, group_stride,
            KIND, SCALE_DTYPE, SCALE_OUTPUTS, SCALE_INPUTS, K, STEP, OUTPUTS, COLUMNS, BLOCK,
        )  # fmt: skip
    if bias is not None:
        gate_bias = bias + expert * (2 * num_outputs) + outputs
        gate += tl.load(gate_bias, mask=outputs < num_outputs, other=0.0).to(tl.float32)[:, None]
        up += tl.load(gate_bias + num_outputs, mask=outputs < num_outputs, other=0.0).to(tl.float32)[:, None]
    mask = (places < end)[:, None] & (outputs < num_outputs)[None, :]
    y = tl.trans(gated(gate, up, ACTIVATION)).to(inner.dtype.element_ty)
    tl.store(inner + places.to(tl.int64)[:, None] * num_outputs + outputs[None, :], y, mask=mask)


@triton.jit
def stack_sum(
    weights, scales, rows, x_rows, weight_stride, scale_stride, group_stride,
    KIND: tl.constexpr, SCALE_DTYPE: tl.constexpr, SCALE_OUTPUTS: tl.constexpr, SCALE_INPUTS: tl.constexpr,
    K: tl.constexpr, STEP: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The products of these rows of a quantised stack with the columns x_rows [1, COLUMNS], over all of K."""
    weight_rows = rows_of(weights, rows, weight_stride, KIND, K, BLOCK)
    scale_rows = scales + rows // SCALE_OUTPUTS * scale_stride
    return quantized_sum(
        weight_rows, scale_rows, x_rows, 0, K, group_stride,
        KIND, SCALE_DTYPE, SCALE_INPUTS, K, STEP, OUTPUTS, COLUMNS, BLOCK,
    )  # fmt: skip


@triton.jit
def two_sums(
    gate_rows, up_rows, x_rows, K: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """`span_sum` over all of K for two tiles of weights [OUTPUTS, 1] that share the columns x_rows [1, COLUMNS]."""
    gate = tl.zeros([OUTPUTS, COLUMNS], tl.float32)
    up = tl.zeros([OUTPUTS, COLUMNS], tl.float32)
    k = tl.arange(0, BLOCK)
    for start in range(0, K, BLOCK):
        if K % BLOCK == 0:
            columns = tl.load(x_rows + (start + k)[:, None])
            gate = tl.dot(tl.load(gate_rows + (start + k)[None, :]), columns, gate, input_precision="ieee")
            up = tl.dot(tl.load(up_rows + (start + k)[None, :]), columns, up, input_precision="ieee")
        else:
            mask = start + k < K
            columns = tl.load(x_rows + (start + k)[:, None], mask=mask[:, None], other=0.0)
            gate = tl.dot(
                tl.load(gate_rows + (start + k)[None, :], mask=mask[None, :], other=0.0),
                columns,
                gate,
                input_precision="ieee",
            )
            up = tl.dot(
                tl.load(up_rows + (start + k)[None, :], mask=mask[None, :], other=0.0),
                columns,
                up,
                input_precision="ieee",
            )
    return gate, up


@triton.jit(do_not_specialize=["max_tiles"])
def down_kernel(
    inner,
    bias,
    tiles,
    chosen_y,
    max_tiles,
    num_outputs,
    weights,
    scales,
    weight_stride,
    scale_stride,
    group_stride,
    KIND: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SCALE_OUTPUTS: tl.constexpr,
    SCALE_INPUTS: tl.constexpr,
    K: tl.constexpr,
    STEP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """inner [T·C, K], weights [E, H, K] → chosen_y [T·C, H] float32, both in the order of `order`. Grid as above."""
    output_tile, tile = tile_of(tl.program_id(0), tl.cdiv(num_outputs, OUTPUTS), max_tiles, GROUP_SIZE)
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    first, end = tl.load(tiles + max_tiles + tile), tl.load(tiles + 2 * max_tiles + tile)
    places = first + tl.arange(0, COLUMNS)
    outputs = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    inner_rows = inner + tl.minimum(places, end - 1).to(tl.int64)[None, :] * K
    rows = tl.minimum(outputs, num_outputs - 1)
    if KIND == "numbers":
        weight_rows = weights + expert.to(tl.int64) * num_outputs * K
        weight_rows += rows.to(tl.int64)[:, None] * K
        total = span_sum(weight_rows, inner_rows, 0, K, K, OUTPUTS, COLUMNS, BLOCK)
    else:
        rows += expert * num_outputs
        total = stack_sum(
            weights, scales, rows, inner_rows, weight_stride, scale_stride, group_stride,
            KIND, SCALE_DTYPE, SCALE_OUTPUTS, SCALE_INPUTS, K, STEP, OUTPUTS, COLUMNS, BLOCK,
        )  # fmt: skip
    if bias is not None:
        bias += expert * num_outputs
        total += tl.load(bias + outputs, mask=outputs < num_outputs, other=0.0).to(tl.float32)[:, None]
    mask = (places < end)[:, None] & (outputs < num_outputs)[None, :]
    tl.store(chosen_y + places.to(tl.int64)[:, None] * num_outputs + outputs[None, :], tl.trans(total), mask=mask)


@triton.jit
def add_chosen_kernel(chosen_y, places, weights, y, hidden_size, NUM_CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """chosen_y [T·C, H] float32 → y [T, H]: its choices' rows, weighed, in their order. Grid: (T, blocks of H)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(NUM_CHOSEN):
        place = tl.load(places + token * NUM_CHOSEN + choice)
        weight = tl.load(weights + token * NUM_CHOSEN + choice)
        row = chosen_y + place.to(tl.int64) * hidden_size
        is_there = (columns < hidden_size) & (place >= 0)
        total += tl.where(place >= 0, weight, 0.0) * tl.load(row + columns, mask=is_there, other=0.0)
    tl.store(y + token * hidden_size + columns, total.to(y.dtype.element_ty), mask=columns < hidden_size)
