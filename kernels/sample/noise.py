"""Noise that is a function of (seed, position, choice, token id): a counter-based generator, no state.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011), in int64 tensors.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def gumbel(seeds: Tensor, positions: Tensor, choices: Tensor, token_ids: Tensor) -> Tensor:
    """Gumbel noise of single tokens. All int64; seeds, positions, choices [R], token_ids [R, K] → [R, K] float32.

    A seed is the signed view of its 64 bits.
    """
    words = philox(_counter(token_ids // 4, positions, choices), _key(seeds))
    word = torch.stack(words, dim=-1).gather(-1, (token_ids % 4)[..., None])[..., 0]
    return _gumbel_of_words(word)


def gumbel_of_all(seeds: Tensor, positions: Tensor, choices: Tensor, num_tokens: int) -> Tensor:
    """The same noise for the token ids 0 … num_tokens - 1: [R, num_tokens], four tokens a call of the generator."""
    groups = torch.arange(-(-num_tokens // 4), device=seeds.device)[None]
    words = philox(_counter(groups, positions, choices), _key(seeds))
    return _gumbel_of_words(torch.stack(words, dim=-1).flatten(1)[:, :num_tokens])


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds. Four counter words and two key words, int64 tensors of values below 2**32 whose shapes broadcast;
    four result words of the common shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    # In the first two rounds most words are one number a row: small tensors.
    for _ in range(2):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((product1 >> 32) ^ c1 ^ k0) & WORD, product1
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & WORD, product0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    shape = (c0 + c1 + c2 + c3).shape
    c0, c1, c2, c3 = (word.expand(shape).contiguous() for word in (c0, c1, c2, c3))
    # In place from here. c1 and c3 may carry bits above the 32nd; the masks of c0 and c2 drop them.
    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(8):
        torch.mul(c0, 0xD2511F53, out=product0)
        torch.mul(c2, 0xCD9E8D57, out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD)
        torch.bitwise_right_shift(product0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, product1, c3, product0 = product1, c1, product0, c3
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)


def _counter(groups: Tensor, positions: Tensor, choices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return groups, positions[:, None], choices[:, None], torch.zeros_like(positions)[:, None]


def _key(seeds: Tensor) -> tuple[Tensor, Tensor]:
    return (seeds & WORD)[:, None], ((seeds >> 32) & WORD)[:, None]


def _gumbel_of_words(words: Tensor) -> Tensor:
    """-log(-log(u)), u = 1 - (word + ½) / 2**32, computed so that u near 1, where winners are, stays precise."""
    tail = words.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return tail.neg_().log1p_().neg_().log_().neg_()
