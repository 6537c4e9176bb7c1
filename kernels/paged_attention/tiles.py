"""How the Triton kernel is tiled: one reasoned entry a device kind, head size and dtypes. Not yet tuned on a device.

`tile` and `split` decide bits: a result is the same in every step on one kind of device, not across entries.
One entry serves prefill and decode alike, so that a token's bits do not depend on which of the two computed it.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from llmd_kernels.kinds import WITH_FLOAT8, kind_of

# What Q and the cache hold: both 16 bits a number, Q 16 and the cache 8, Q 32 and the cache more than 8, or 8.
Numbers = Literal["16/16", "16/8", "32", "32/8"]
# The block sizes that are proven. An entry holds for all of them until a device shows a reason to differ.
BLOCK_SIZES = (16, 32, 64)


@dataclass(frozen=True, slots=True)
class TileConfig:
    rows: int  # (query, head of the group) pairs of a tile
    tile: int  # keys of a tile
    split: int  # keys of a split: a multiple of tile
    num_warps: int
    num_stages: int  # tiles of K and V in flight
    programs_per_processor: int  # that run at a time
    float8_by_bits: bool = False  # the device has no float8: its numbers are put together from their bits


def padded_dim(head_dim: int) -> int:
    """The head size inside the kernel: a power of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


def numbers(q_dtype: torch.dtype, cache_dtype: torch.dtype) -> Numbers | None:
    match q_dtype.itemsize, cache_dtype.itemsize:
        case 2, 2:
            return "16/16"
        case 2, 1:
            return "16/8"
        case 4, 2 | 4:
            return "32"
        case 4, 1:
            return "32/8"
        case _:
            return None


# Why these, until a device says better:
# - 64 rows are what one wgmma takes. A decode step fills only a group's rows of them, which costs nothing as long as
#   64 rows × 4 operations for the 4 bytes of a key and its value (64 operations a byte) are less than a tensor core
#   does while a byte arrives (about 260 on sm_90). With head size 256 registers suffice for 32 rows (mma).
# - A float32 product is made of multiplications and additions on NVIDIA: small tiles. Which of them fit into registers
#   follows no rule that we know.
# - Splits of 256 keys keep the processors of an H100 busy from four sequences of 2,048 tokens on (8 KV heads) and cost
#   3 % more bytes where they are handed on; where there is enough to do they are merged in registers for nothing.
# - Tiles, warps and stages are the largest that keep everything in registers, found by compiling. sm_86, sm_89 and
#   sm_120 have 99 KiB of shared memory a program, of which these take 52 at most.
# - What is missing for float32 spills, whatever was tried.
TABLE: dict[tuple[str, int, Numbers], TileConfig] = {
    ("sm_80", 64, "16/16"): TileConfig(64, 64, 256, 4, 3, 2),
    ("sm_80", 128, "16/16"): TileConfig(64, 64, 256, 8, 3, 1),
    ("sm_80", 256, "16/16"): TileConfig(32, 32, 256, 8, 3, 1),
    ("sm_80", 64, "16/8"): TileConfig(64, 64, 256, 8, 3, 1),
    ("sm_80", 128, "16/8"): TileConfig(64, 64, 256, 8, 2, 1),
    ("sm_80", 256, "16/8"): TileConfig(32, 32, 256, 8, 2, 1),
    ("sm_80", 64, "32"): TileConfig(16, 16, 256, 4, 2, 2),
    ("sm_80", 128, "32"): TileConfig(16, 16, 256, 8, 1, 1),
    ("sm_80", 256, "32"): TileConfig(16, 16, 256, 8, 1, 1),
    ("sm_80", 64, "32/8"): TileConfig(16, 16, 256, 4, 2, 2),
    ("sm_80", 128, "32/8"): TileConfig(16, 16, 256, 8, 1, 1),
    ("sm_80", 256, "32/8"): TileConfig(16, 16, 256, 4, 1, 1),
    ("sm_86", 64, "16/16"): TileConfig(64, 64, 256, 8, 3, 1),
    ("sm_86", 128, "16/16"): TileConfig(64, 32, 256, 8, 3, 1),
    ("sm_86", 256, "16/16"): TileConfig(32, 32, 256, 8, 3, 1),
    ("sm_86", 64, "16/8"): TileConfig(64, 32, 256, 8, 2, 1),
    ("sm_86", 128, "16/8"): TileConfig(64, 32, 256, 8, 2, 1),
    ("sm_86", 256, "16/8"): TileConfig(32, 32, 256, 8, 2, 1),
    ("sm_86", 64, "32"): TileConfig(16, 16, 256, 4, 2, 2),
    ("sm_86", 128, "32"): TileConfig(16, 16, 256, 8, 1, 1),
    ("sm_86", 64, "32/8"): TileConfig(16, 16, 256, 4, 2, 2),
    ("sm_89", 64, "16/16"): TileConfig(64, 64, 256, 8, 3, 1),
    ("sm_89", 128, "16/16"): TileConfig(64, 32, 256, 8, 3, 1),
    ("sm_89", 256, "16/16"): TileConfig(32, 32, 256, 8, 3, 1),
    ("sm_89", 64, "16/8"): TileConfig(64, 32, 256, 8, 2, 1),
    ("sm_89", 128, "16/8"): TileConfig(64, 32, 256, 8, 2, 1),
    ("sm_89", 256, "16/8"): TileConfig(32, 32, 256, 8, 2, 1),
    ("sm_89", 64, "32"): TileConfig(16, 16, 256, 4, 2, 2),
    ("sm_89", 128, "32"): TileConfig(16, 16, 256, 8, 1, 1),
    ("sm_89", 64, "32/8"): TileConfig(16, 16, 256, 4, 2, 2),
    ("sm_90", 64, "16/16"): TileConfig(64, 64, 256, 4, 3, 2),
    ("sm_90", 128, "16/16"): TileConfig(64, 64, 256, 8, 3, 1),
    ("sm_90", 256, "16/16"): TileConfig(32, 32, 256, 8, 3, 1),
    ("sm_90", 64, "16/8"): TileConfig(64, 64, 256, 8, 3, 1),
    ("sm_90", 128, "16/8"): TileConfig(64, 64, 256, 8, 2, 1),
    ("sm_90", 256, "16/8"): TileConfig(32, 32, 256, 8, 3, 1),
    ("sm_90", 64, "32"): TileConfig(16, 32, 256, 4, 1, 2),
    ("sm_90", 128, "32"): TileConfig(16, 16, 256, 8, 1, 1),
    ("sm_90", 256, "32"): TileConfig(16, 16, 256, 8, 1, 1),
    ("sm_90", 64, "32/8"): TileConfig(16, 32, 256, 4, 1, 2),
    ("sm_90", 128, "32/8"): TileConfig(16, 16, 256, 8, 1, 1),
    ("sm_90", 256, "32/8"): TileConfig(16, 32, 256, 8, 1, 1),
    ("sm_100", 64, "16/16"): TileConfig(64, 64, 256, 4, 3, 2),
    ("sm_100", 128, "16/16"): TileConfig(64, 64, 256, 8, 3, 1),
    ("sm_100", 256, "16/16"): TileConfig(32, 32, 256, 8, 3, 1),
    ("sm_100", 64, "16/8"): TileConfig(64, 64, 256, 8, 3, 1),
    ("sm_100", 128, "16/8"): TileConfig(64, 64, 256, 8, 2, 1),
    ("sm_100", 256, "16/8"): TileConfig(32, 32, 256, 8, 2, 1),
    ("sm_100", 64, "32"): TileConfig(16, 64, 256, 4, 2, 2),
    ("sm_100", 128, "32"): TileConfig(16, 16, 256, 4, 1, 2),
    ("sm_100", 256, "32"): TileConfig(16, 16, 256, 8, 1, 1),
    ("sm_100", 64, "32/8"): TileConfig(16, 32, 256, 4, 1, 2),
    ("sm_120", 64, "16/16"): TileConfig(64, 64, 256, 8, 3, 1),
    ("sm_120", 128, "16/16"): TileConfig(64, 32, 256, 8, 3, 1),
    ("sm_120", 256, "16/16"): TileConfig(32, 32, 256, 8, 3, 1),
    ("sm_120", 64, "16/8"): TileConfig(64, 32, 256, 8, 2, 1),
    ("sm_120", 128, "16/8"): TileConfig(64, 32, 256, 8, 2, 1),
    ("sm_120", 256, "16/8"): TileConfig(32, 32, 256, 8, 2, 1),
    ("sm_120", 64, "32"): TileConfig(16, 32, 256, 4, 2, 2),
    ("sm_120", 128, "32"): TileConfig(16, 16, 256, 8, 1, 1),
    ("sm_120", 64, "32/8"): TileConfig(16, 16, 256, 4, 2, 2),
    ("gfx942", 64, "16/16"): TileConfig(64, 64, 256, 4, 1, 2),
    ("gfx942", 128, "16/16"): TileConfig(64, 64, 256, 4, 1, 1),
    ("gfx942", 256, "16/16"): TileConfig(32, 32, 256, 8, 1, 1),
    ("gfx942", 64, "16/8"): TileConfig(64, 32, 256, 4, 1, 1),
    ("gfx942", 128, "16/8"): TileConfig(64, 32, 256, 4, 1, 1),
    ("gfx942", 256, "16/8"): TileConfig(32, 16, 256, 8, 1, 1),
    ("gfx942", 64, "32"): TileConfig(16, 32, 256, 4, 1, 2),
    ("gfx942", 128, "32"): TileConfig(16, 32, 256, 4, 1, 1),
    ("gfx942", 256, "32"): TileConfig(16, 32, 256, 4, 1, 1),
    ("gfx942", 64, "32/8"): TileConfig(16, 32, 256, 4, 1, 2),
    ("gfx942", 128, "32/8"): TileConfig(16, 32, 256, 4, 1, 1),
    ("gfx942", 256, "32/8"): TileConfig(16, 32, 256, 4, 1, 1),
}


def find_config(arch: str, head_dim: int, q_dtype: torch.dtype, cache_dtype: torch.dtype) -> TileConfig | None:
    """The entry for this kind of device; None where there is none, or no proof of it."""
    kind, held = kind_of(arch), numbers(q_dtype, cache_dtype)
    config = None if held is None else TABLE.get((kind, max(64, padded_dim(head_dim)), held))
    if config is None or kind in WITH_FLOAT8 or cache_dtype.itemsize > 1:
        return config
    return replace(config, float8_by_bits=True) if cache_dtype == torch.float8_e4m3fn else None
