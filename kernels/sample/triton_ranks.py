"""In which order tokens are looked at and how much they weigh, in integers: no order of additions can show in them."""

import triton
import triton.language as tl


@triton.jit
def weights_of(scores, largest, temperature):
    """exp((score - largest) / temperature): 1 for the largest, 0 for -inf."""
    return tl.where(scores > float("-inf"), tl.exp((scores - largest) / temperature), 0.0)


@triton.jit
def units_of(weights):
    """Weights in units of 2**-40, whose sums over a vocabulary are exact."""
    return (weights * 1099511627776.0).to(tl.int64)


@triton.jit
def ranks_of(scores, ids):
    """int64 that order tokens: larger scores first, of equal ones the lower id; all different."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.to(tl.int64) * 1048576 + (1048575 - ids)


@triton.jit
def wanted_units(total, top_p):
    """The least number of units that reaches top_p of the total."""
    return tl.ceil(total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64)
