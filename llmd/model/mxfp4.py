"""MXFP4 weights as numbers. Knows no model and no file.

Format (OCP Microscaling Formats 1.0): 32 neighbours along a row share one scale, a power of two, kept as its exponent
plus 127 in a byte; each number is 4 bits (a sign, 2 bits of exponent, 1 of mantissa), two a byte, the first in the low
bits. A scale byte of 255 is "not a number".
"""

import torch
from torch import Tensor

from llmd.model.parallel import MXFP4_BLOCK

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES))
EXPONENT_BIAS = 127
NOT_A_NUMBER = 255


def mxfp4_numbers(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """codes: uint8 [N, K], one number each; exponents: uint8 [N, K / 32] → [N, K]. Bitwise as the kernels have it.

    Every MXFP4 number is exact in bfloat16 and float32. float16 holds powers of two from 2⁻²⁴ to 2¹⁵: a smaller scale
    counts as 0 there and a greater one as infinity, and products are rounded.
    """
    values = torch.tensor(VALUES, device=codes.device)[codes.int()]
    powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - EXPONENT_BIAS)
    powers.masked_fill_(exponents == NOT_A_NUMBER, torch.nan)
    scales = powers.to(dtype).float().repeat_interleave(MXFP4_BLOCK, dim=1)
    return values.mul_(scales).to(dtype)
