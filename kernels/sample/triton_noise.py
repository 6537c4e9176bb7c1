"""Gumbel noise in Triton, and what is drawn with it. Shared by all kernels that draw, so that they draw alike.

Philox4x32-10 is the one of Triton's own library; key and counter are those of `noise.py`.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def gumbel(groups, seed, position, choice):
    """Noise of the tokens 4 g … 4 g + 3 of each g of groups: float32 [*groups, 2, 2], flat in the order of the ids."""
    word0, word1, word2, word3 = tl.philox(seed, groups, position, choice, 0)
    return gumbel_of_words(tl.join(tl.join(word0, word2), tl.join(word1, word3)))


@triton.jit
def gumbel_of_ids(ids, seed, position, choice):
    """Noise of single tokens: float32, shaped as ids."""
    word0, word1, word2, word3 = tl.philox(seed, ids // 4, position, choice, 0)
    even = tl.where(ids % 4 == 0, word0, word2)
    odd = tl.where(ids % 4 == 1, word1, word3)
    return gumbel_of_words(tl.where(ids % 2 == 0, even, odd))


@triton.jit
def gumbel_of_words(words):
    """-log(-log(u)), u = 1 - (word + ½) / 2**32, computed so that u near 1, where winners are, stays precise."""
    tail = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    return -tl.log(-libdevice.log1p(-tail))


@triton.jit
def noisy(scores, temperature, noise):
    """What is compared in a draw. Not divided by the temperature: 0 needs no case of its own, no row its maximum."""
    return tl.fma(temperature, noise, scores)


@triton.jit
def best_of(scores, ids, axis: tl.constexpr):
    """(the largest score, of equal ones the lowest id), both [1 along axis]."""
    best = tl.max(scores, axis=axis, keep_dims=True)
    return best, tl.min(tl.where(scores == best, ids, 2147483647), axis=axis, keep_dims=True)


@triton.jit
def pick_kernel(best_scores, best_ids, token_ids, num_parts, stride, num_tokens, PARTS: tl.constexpr):
    """The best of each row's parts: best_scores, best_ids [R, stride] → token_ids [R] int64. Grid: (R,).

    What lies behind the parts of a row is read and not looked at: a mask of whole wide loads leaves them wide.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    score = tl.full([PARTS], float("-inf"), tl.float32)
    token_id = tl.full([PARTS], 2147483647, tl.int32)
    for first in range(0, num_parts, PARTS):
        mask = first + part < stride
        other = tl.load(best_scores + row * stride + first + part, mask=mask, other=float("-inf"))
        other_id = tl.load(best_ids + row * stride + first + part, mask=mask, other=2147483647)
        better = (other > score) | ((other == score) & (other_id < token_id))
        better = better & (first + part < num_parts)
        score, token_id = tl.where(better, other, score), tl.where(better, other_id, token_id)
    _, best = best_of(score, token_id, 0)
    # Where no token has a number for a score, any that exists.
    tl.store(token_ids + row + tl.arange(0, 1), tl.minimum(best, num_tokens - 1).to(tl.int64))
