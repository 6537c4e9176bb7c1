"""MXFP4 weights as numbers. Knows no model and no file.

Format (OCP Microscaling Formats 1.0): 32 neighbours along a row share one scale, a power of two, kept as its exponent
plus 127 in a byte; each number is 4 bits (a sign, 2 bits of exponent, 1 of mantissa), two a byte, the first in the low
bits. A scale byte of 255 is "not a number".
"""

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES))
EXPONENT_BIAS = 127
NOT_A_NUMBER = 255


def copy_mxfp4(target: Tensor, blocks: Tensor, scales: Tensor) -> None:
    """Write the numbers of blocks [N, K / 32, 16] uint8 and scales [N, K / 32] uint8 to target [N, K], on its device.

    Every MXFP4 number is exact in bfloat16 and float32; float16 holds those of exponents from −23 to 13.
    """
    blocks, scales = blocks.to(target.device), scales.to(target.device)
    pairs = _pairs_of_values(target.device)
    values = pairs.index_select(0, blocks.flatten().int()).view(*blocks.shape[:-1], -1)
    powers = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - EXPONENT_BIAS)
    powers.masked_fill_(scales == NOT_A_NUMBER, torch.nan)
    target.copy_(values.mul_(powers[..., None]).flatten(1))


def _pairs_of_values(device: torch.device) -> Tensor:
    """[256, 2] float32: the two numbers of a byte."""
    values = torch.tensor(VALUES, dtype=torch.float32)
    codes = torch.arange(256)
    return torch.stack((values[codes & 15], values[codes >> 4]), dim=1).to(device)
