"""Which tile a launch of `linear` has for many tokens: by arithmetic, the one that ends first. Knows no kernel.

No bit depends on the choice, so it may ask anything about the device. Nothing of it was measured.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llmd_kernels.kinds import kind_of

# Clock cycles of a program in which its multiprocessor multiplies nothing: the pipeline fills, the results are stored.
TURN_CYCLES = 2000
# Likewise of a second launch, which adds the spans up.
LAUNCH_CYCLES = 4000
# Bytes a cycle of one multiprocessor to and from memory: 3 TB/s for 132 of them at 1.7 GHz.
MEMORY_BYTES = 13


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes, and how. Its numbers are 16 bits wide."""

    outputs: int
    tokens: int
    num_warps: int
    num_stages: int  # of the pipeline that loads
    splits: bool = False  # each span of K has programs of its own, and a second launch adds the spans up
    # The hardware brings whole blocks, told where by tensor descriptors (TMA); else each thread brings 16 bytes.
    descriptors: bool = False


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of device: data sheets say what its multiprocessors (compute units) multiply, the rest is estimated."""

    num_processors: int
    products: int  # multiplications and additions a cycle of one multiprocessor
    loaded_bytes: int  # a cycle of one multiprocessor, from the cache that all share
    # Tiles for programs that sum one span, or all of a weight that has one; and those that keep two sums in registers.
    tiles: tuple[Tile, ...]
    tiles_of_two_sums: tuple[Tile, ...]


# wgmma and tcgen05 read shared memory: 256 columns wait for it least, and loads of so large a tile take less of the
# cache's bandwidth than there is. A program that has several spans adds them in registers, where two sums of 128×256
# are more than there are.
_WIDE = (
    Tile(128, 256, 8, 4, descriptors=True),
    Tile(256, 128, 8, 4, descriptors=True),
    Tile(128, 128, 8, 3, descriptors=True),
    Tile(64, 128, 4, 4, descriptors=True),
)
_WIDE_OF_TWO_SUMS = (Tile(128, 128, 8, 4, descriptors=True), Tile(64, 128, 4, 4, descriptors=True))
# mma.sync and mfma multiply what is in registers; 128×256 leaves none for anything else.
_NARROW = (Tile(128, 128, 8, 3), Tile(64, 128, 4, 3))
_NARROW_OF_TWO_SUMS = (Tile(128, 128, 8, 3), Tile(64, 128, 8, 3))

DEVICES = {
    "sm_80": Device(108, 1024, 40, _NARROW, _NARROW_OF_TWO_SUMS),
    "sm_86": Device(84, 512, 20, _NARROW, _NARROW_OF_TWO_SUMS),
    "sm_89": Device(142, 512, 20, _NARROW, _NARROW_OF_TWO_SUMS),
    "sm_90": Device(132, 2048, 40, _WIDE, _WIDE_OF_TWO_SUMS),
    "sm_100": Device(148, 4096, 40, _WIDE, _WIDE_OF_TWO_SUMS),
    "sm_120": Device(170, 512, 20, _NARROW, _NARROW_OF_TWO_SUMS),
    "gfx942": Device(304, 1024, 50, _NARROW, _NARROW_OF_TWO_SUMS),
}
# For weights whose rows are no whole number of turns: loads are masked, perhaps narrow, and need registers.
MASKED = Tile(64, 64, 8, 3)


def find_device(arch: str) -> Device:
    """arch: "sm_90", "gfx942". One that is not known has the tiles that fit everywhere."""
    return DEVICES.get(kind_of(arch), DEVICES["sm_86"])


def find_tile(
    num_tokens: int, num_inputs: int, num_outputs: int, *, span: int, device: Device, num_processors: int | None = None
) -> Tile:
    """The tile for a weight [outputs, inputs] whose spans have `span` inputs; num_processors: None: the usual number.

    Numbers of tokens count by the power of two that holds them, so that a model needs few kernels.
    """
    return _find((1 << (num_tokens - 1).bit_length(), num_inputs, num_outputs), span, device, num_processors)


@functools.cache
def _find(size: tuple[int, int, int], span: int, device: Device, num_processors: int | None) -> Tile:
    found = candidates(device, has_spans=span < size[1])
    return min(found, key=lambda tile: cycles(tile, size, span, device, num_processors))


def candidates(device: Device, *, has_spans: bool) -> list[Tile]:
    """What can be chosen for a weight: if it has spans, programs that hold two sums, or programs for each span."""
    if not has_spans:
        return list(device.tiles)
    return [*device.tiles_of_two_sums, *(replace(tile, splits=True) for tile in device.tiles)]


def with_pointers(tiles: Iterable[Tile]) -> list[Tile]:
    """These, and for those with descriptors the same with pointers, which is what rows that are not aligned have."""
    return list(dict.fromkeys(one for tile in tiles for one in (tile, replace(tile, descriptors=False))))


def cycles(tile: Tile, size: Sequence[int], span: int, device: Device, num_processors: int | None = None) -> float:
    """Clock cycles until a product of size (tokens, inputs, outputs) has ended, if nothing but this matters:

    programs are dealt out evenly, and the multiprocessor with the most of them is the last. It multiplies, or waits for
    what it multiplies, whichever takes longer.
    """
    num_tokens, num_inputs, num_outputs = size
    num_processors = num_processors or device.num_processors
    num_programs = -(-num_tokens // tile.tokens) * -(-num_outputs // tile.outputs)
    multiplying = tile.outputs * tile.tokens / device.products
    loading = (tile.outputs + tile.tokens) * 2 / device.loaded_bytes
    cycles_per_input = max(multiplying, loading)
    if not tile.splits:
        return -(-num_programs // num_processors) * (num_inputs * cycles_per_input + TURN_CYCLES)
    num_spans = -(-num_inputs // span)
    # Sums are written and read in float32.
    handed_on = num_spans * num_tokens * num_outputs * 8 / (num_processors * MEMORY_BYTES)
    rounds = -(-num_programs * num_spans // num_processors)
    return rounds * (span * cycles_per_input + TURN_CYCLES) + handed_on + LAUNCH_CYCLES
