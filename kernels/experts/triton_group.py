"""The choices of a step grouped by expert, on the device: where each lies, and the tiles that are computed together."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmd_kernels.target import at_most


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
