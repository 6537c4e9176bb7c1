"""`experts` in Triton, in four launches: group the choices by expert, gate and up, down, add up the chosen.

A choice is a pair (token, expert), numbered t · C + c. Its numbers are computed as `linear` computes them: weights are
the matrix units' rows, choices their columns, every output one chain over K in blocks of BLOCK_K in rising order. So
its bits depend neither on which other choices share its tile nor on how wide the tile is.

How many choices an expert has only the device knows. Grids are bounds: programs beyond the last tile end at once.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.gated_mul.triton_ops import gated
from llmd_kernels.linear.triton_ops import BLOCK_K, span_sum, tile_of
from llmd_kernels.target import at_most, of_one_depth

# Tiles of choices that are computed side by side for one tile of outputs, to share what the cache holds.
GROUP = 8


def experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Literal["silu", "gelu_tanh", "gelu", "clamped_silu"],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Products and their weighted sum in float32; rounded are gated_mul's results and, once, what is returned."""
    num_tokens, hidden_size = x.shape
    num_experts, _, intermediate_size = down.shape
    num_chosen = expert_ids.shape[1]
    num_choices = num_tokens * num_chosen
    y = torch.empty(num_tokens, hidden_size, dtype=x.dtype, device=x.device)
    if num_choices == 0:
        return y.zero_()
    x = x if x.stride(1) == 1 else x.contiguous()
    expert_ids, weights, gate_up, down = (part.contiguous() for part in (expert_ids, weights, gate_up, down))
    columns = tile_columns(num_choices, num_experts, itemsize=x.itemsize)
    order, places, tiles = group(expert_ids, num_experts, columns)
    num_tiles = tiles.shape[1]

    inner = torch.empty(num_choices, intermediate_size, dtype=x.dtype, device=x.device)
    outputs, num_warps, num_stages = gate_up_tile(columns, itemsize=x.itemsize)
    gate_up_kernel[(num_tiles * triton.cdiv(intermediate_size, outputs),)](
        x,
        gate_up,
        gate_up_bias,
        order,
        tiles,
        inner,
        num_tiles,
        intermediate_size,
        x.stride(0),
        NUM_CHOSEN=num_chosen,
        K=hidden_size,
        ACTIVATION=activation,
        OUTPUTS=outputs,
        COLUMNS=columns,
        BLOCK=BLOCK_K,
        GROUP_SIZE=GROUP,
        num_warps=num_warps,
        num_stages=num_stages,
        **of_one_depth(),
    )
    chosen_y = torch.empty(num_choices, hidden_size, dtype=torch.float32, device=x.device)
    outputs, num_warps, num_stages = down_tile(columns, itemsize=x.itemsize)
    down_kernel[(num_tiles * triton.cdiv(hidden_size, outputs),)](
        inner,
        down,
        down_bias,
        tiles,
        chosen_y,
        num_tiles,
        hidden_size,
        K=intermediate_size,
        OUTPUTS=outputs,
        COLUMNS=columns,
        BLOCK=BLOCK_K,
        GROUP_SIZE=GROUP,
        num_warps=num_warps,
        num_stages=num_stages,
        **of_one_depth(),
    )
    add_chosen_kernel[(num_tokens, triton.cdiv(hidden_size, 1024))](
        chosen_y, places, weights, y, hidden_size, NUM_CHOSEN=num_chosen, BLOCK=1024, num_warps=2
    )
    return y


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


def group(expert_ids: Tensor, num_experts: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """expert_ids [T, C] → (order [T·C]: choices by expert, then number; places [T·C] in it; tiles [3, most possible]).

    A tile is (expert, first, end): that many places in `order`, at most `columns`, all of one expert. Tiles beyond the
    last one have expert −1, choices of no expert have place −1; what `order` holds behind the others is undefined.
    """
    num_choices = expert_ids.numel()
    # Each expert can leave one tile that is not full.
    num_tiles = min(num_choices, (num_choices + min(num_experts, num_choices) * (columns - 1)) // columns)
    order, places = torch.empty(2, num_choices, dtype=torch.int32, device=expert_ids.device)
    tiles = torch.empty(3, num_tiles, dtype=torch.int32, device=expert_ids.device)
    group_kernel[(num_experts,)](
        expert_ids,
        order,
        places,
        tiles,
        num_choices,
        num_tiles,
        columns,
        NUM_EXPERTS=num_experts,
        # One more, for choices of no expert.
        BINS=max(32, triton.next_power_of_2(num_experts + 1)),
        BLOCK=256 if num_choices <= 256 else 2048,
        num_warps=8,
        **at_most(128),
    )
    return order, places, tiles


@triton.jit(do_not_specialize=["num_choices", "max_tiles", "columns"])
def group_kernel(
    expert_ids,
    order,
    places,
    tiles,
    num_choices,
    max_tiles,
    columns,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (experts,). A program counts the choices of all experts, then finds and writes the places of its own.

    The last one also writes what belongs to nobody.
    """
    expert = tl.program_id(0)
    block, bins = tl.arange(0, BLOCK), tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_choices, BLOCK):
        counts += tl.histogram(load_ids(expert_ids, start + block, num_choices, NUM_EXPERTS), BINS)
    counts = tl.where(bins < NUM_EXPERTS, counts, 0)
    first = tl.sum(tl.where(bins < expert, counts, 0))
    end = first + tl.sum(tl.where(bins == expert, counts, 0))

    before = first
    for start in range(0, num_choices, BLOCK):
        choices = start + block
        ids = load_ids(expert_ids, choices, num_choices, NUM_EXPERTS)
        is_own = ids == expert
        place = before + tl.cumsum(is_own.to(tl.int32), 0) - 1
        tl.store(order + place, choices, mask=is_own)
        tl.store(places + choices, place, mask=is_own)
        before += tl.sum(is_own.to(tl.int32))
        if expert == NUM_EXPERTS - 1:
            tl.store(places + choices, place * 0 - 1, mask=(ids == NUM_EXPERTS) & (choices < num_choices))

    num_tiles = (counts + columns - 1) // columns
    first_tile = tl.sum(tl.where(bins < expert, num_tiles, 0))
    end_tile = first_tile + tl.sum(tl.where(bins == expert, num_tiles, 0))
    for start in range(first_tile, end_tile, BLOCK):
        tile = start + block
        tile_first = first + (tile - first_tile) * columns
        store_tiles(tiles, tile, tile < end_tile, max_tiles, expert, tile_first, tl.minimum(tile_first + columns, end))
    if expert == NUM_EXPERTS - 1:
        for start in range(end_tile, max_tiles, BLOCK):
            tile = start + block
            store_tiles(tiles, tile, tile < max_tiles, max_tiles, -1, tile * 0, tile * 0)


@triton.jit
def load_ids(expert_ids, choices, num_choices, NUM_EXPERTS: tl.constexpr):
    """The experts of these choices; NUM_EXPERTS where there is none."""
    ids = tl.load(expert_ids + choices, mask=choices < num_choices, other=-1)
    return tl.where((ids >= 0) & (ids < NUM_EXPERTS), ids, NUM_EXPERTS)


@triton.jit
def store_tiles(tiles, tile, mask, max_tiles, expert, first, end):
    """Write the records of these tiles."""
    tl.store(tiles + tile, tile * 0 + expert, mask=mask)
    tl.store(tiles + max_tiles + tile, first, mask=mask)
    tl.store(tiles + 2 * max_tiles + tile, end, mask=mask)


@triton.jit(do_not_specialize=["max_tiles"])
def gate_up_kernel(
    x,
    gate_up,
    bias,
    order,
    tiles,
    inner,
    max_tiles,
    num_outputs,
    x_stride,
    NUM_CHOSEN: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """x [T, K], gate_up [E, 2·I, K] → inner [T·C, I] in the order of `order`. Grid: (tiles · tiles of outputs,)."""
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
    gate_rows = gate_up + expert.to(tl.int64) * (2 * num_outputs) * K
    gate_rows += tl.minimum(outputs, num_outputs - 1).to(tl.int64)[:, None] * K
    up_rows = gate_rows + num_outputs.to(tl.int64) * K
    gate, up = two_sums(gate_rows, up_rows, x_rows, K, OUTPUTS, COLUMNS, BLOCK)
    if bias is not None:
        gate_bias = bias + expert * (2 * num_outputs) + outputs
        gate += tl.load(gate_bias, mask=outputs < num_outputs, other=0.0).to(tl.float32)[:, None]
        up += tl.load(gate_bias + num_outputs, mask=outputs < num_outputs, other=0.0).to(tl.float32)[:, None]
    mask = (places < end)[:, None] & (outputs < num_outputs)[None, :]
    y = tl.trans(gated(gate, up, ACTIVATION)).to(inner.dtype.element_ty)
    tl.store(inner + places.to(tl.int64)[:, None] * num_outputs + outputs[None, :], y, mask=mask)


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
    down,
    bias,
    tiles,
    chosen_y,
    max_tiles,
    num_outputs,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """inner [T·C, K], down [E, H, K] → chosen_y [T·C, H] float32, both in the order of `order`. Grid as above."""
    output_tile, tile = tile_of(tl.program_id(0), tl.cdiv(num_outputs, OUTPUTS), max_tiles, GROUP_SIZE)
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    first, end = tl.load(tiles + max_tiles + tile), tl.load(tiles + 2 * max_tiles + tile)
    places = first + tl.arange(0, COLUMNS)
    outputs = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    inner_rows = inner + tl.minimum(places, end - 1).to(tl.int64)[None, :] * K
    weight_rows = down + expert.to(tl.int64) * num_outputs * K
    weight_rows += tl.minimum(outputs, num_outputs - 1).to(tl.int64)[:, None] * K
    total = span_sum(weight_rows, inner_rows, 0, K, K, OUTPUTS, COLUMNS, BLOCK)
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
