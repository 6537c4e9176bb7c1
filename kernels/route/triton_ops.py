"""`route` in Triton: a program takes a few tokens, and as often as there are to choose it takes the greatest key.

A key is an integer that has the order of (score, lower id first), so that one maximum finds the expert and ties end as
they must. No key equals another, whatever the scores are: ids always differ.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of a program: eight a thread of four warps.
NUMBERS = 1024
NUM_WARPS = 4
TINY = tl.constexpr(1e-20)


def route(
    logits: Tensor,
    num_chosen: int,
    scoring: Literal["softmax", "sigmoid"],
    renormalize: bool,
    scale: float = 1.0,
    choice_bias: Tensor | None = None,
    num_groups: int = 1,
    num_chosen_groups: int = 1,
    group_score: Literal["max", "top2"] = "max",
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computed in float32."""
    num_tokens, num_experts = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    expert_ids = torch.empty(num_tokens, num_chosen, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_tokens, num_chosen, dtype=torch.float32, device=logits.device)
    if num_tokens == 0:
        return expert_ids, weights
    group_size = num_experts // num_groups
    groups, size = triton.next_power_of_2(num_groups), triton.next_power_of_2(group_size)
    tokens = max(1, NUMBERS // (groups * size))
    route_kernel[(triton.cdiv(num_tokens, tokens),)](
        logits,
        choice_bias,
        slots,
        expert_ids,
        weights,
        num_tokens,
        logits.stride(0),
        scale,
        NUM_CHOSEN=num_chosen,
        SOFTMAX=scoring == "softmax",
        RENORMALIZE=renormalize,
        NUM_GROUPS=num_groups,
        GROUP_SIZE=group_size,
        NUM_CHOSEN_GROUPS=num_chosen_groups,
        TOP2=group_score == "top2" and num_groups > num_chosen_groups,
        TOKENS=tokens,
        GROUPS=groups,
        SIZE=size,
        CHOICES=triton.next_power_of_2(num_chosen),
        num_warps=NUM_WARPS,
    )
    return expert_ids, weights


@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(
    logits,
    choice_bias,
    slots,
    expert_ids,
    weights,
    num_tokens,
    stride,
    scale,
    NUM_CHOSEN: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_CHOSEN_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """logits [T, E] with rows `stride` apart → expert_ids and weights [T, NUM_CHOSEN].

    GROUPS, SIZE and CHOICES are the next powers of two of NUM_GROUPS, GROUP_SIZE and NUM_CHOSEN. Grid: (blocks of T,).
    """
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    groups, members = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    ids = groups[:, None] * GROUP_SIZE + members[None, :]
    exists = ((groups < NUM_GROUPS)[:, None] & (members < GROUP_SIZE)[None, :])[None, :, :]
    mask = exists & (tokens < num_tokens)[:, None, None]
    numbers = tl.load(logits + tokens[:, None, None] * stride + ids[None, :, :], mask=mask, other=0.0).to(tl.float32)

    if SOFTMAX:
        greatest = tl.max(tl.max(tl.where(exists, numbers, float("-inf")), axis=2), axis=1)
        scores = tl.where(exists, tl.exp(numbers - greatest[:, None, None]), 0.0)
        scores /= tl.sum(tl.sum(scores, axis=2), axis=1)[:, None, None]
    else:
        scores = 1.0 / (1.0 + tl.exp(-numbers))
    # Logits have the order of the scores and are not rounded.
    choice = scores if TOP2 else numbers
    if choice_bias is not None:
        bias = tl.load(
            choice_bias + ids, mask=(groups < NUM_GROUPS)[:, None] & (members < GROUP_SIZE)[None, :], other=0.0
        )
        choice = scores + bias.to(tl.float32)[None, :, :]
    keys = tl.where(exists, ordered(choice, ids[None, :, :]), -1)
    if NUM_GROUPS > NUM_CHOSEN_GROUPS:
        keys = tl.where(is_best_group(choice, keys, groups, NUM_CHOSEN_GROUPS, TOP2)[:, :, None], keys, -1)

    choices = tl.arange(0, CHOICES)
    chosen = tl.zeros([TOKENS, CHOICES], tl.int32)
    chosen_scores = tl.zeros([TOKENS, CHOICES], tl.float32)
    for place in tl.static_range(NUM_CHOSEN):
        best = tl.max(tl.max(keys, axis=2), axis=1)
        is_best = keys == best[:, None, None]
        score = tl.sum(tl.sum(tl.where(is_best, scores, 0.0), axis=2), axis=1)
        chosen = tl.where((choices == place)[None, :], id_of(best)[:, None], chosen)
        chosen_scores = tl.where((choices == place)[None, :], score[:, None], chosen_scores)
        keys = tl.where(is_best, -1, keys)
    if RENORMALIZE:
        chosen_scores /= (tl.sum(chosen_scores, axis=1) + TINY)[:, None]
    chosen_scores *= scale
    if slots is not None:
        has_slot = tl.load(slots + tokens, mask=tokens < num_tokens, other=-1) >= 0
        chosen = tl.where(has_slot[:, None], chosen, -1)
        chosen_scores = tl.where(has_slot[:, None], chosen_scores, 0.0)
    places = tokens[:, None] * NUM_CHOSEN + choices[None, :]
    stored = (tokens < num_tokens)[:, None] & (choices < NUM_CHOSEN)[None, :]
    tl.store(expert_ids + places, chosen, mask=stored)
    tl.store(weights + places, chosen_scores, mask=stored)


@triton.jit
def is_best_group(choice, keys, groups, NUM_CHOSEN_GROUPS: tl.constexpr, TOP2: tl.constexpr):
    """choice and keys [T, GROUPS, SIZE] → [T, GROUPS]: whether a group is one of the best of its token."""
    best = tl.max(keys, axis=2)
    worth = tl.max(tl.where(keys == best[:, :, None], choice, float("-inf")), axis=2)
    if TOP2:
        others = (keys != best[:, :, None]) & (keys >= 0)
        worth += tl.max(tl.where(others, choice, float("-inf")), axis=2)
    group_keys = tl.where(best >= 0, ordered(worth, groups[None, :]), -1)
    chosen = group_keys < -1
    for _ in tl.static_range(NUM_CHOSEN_GROUPS):
        is_best = group_keys == tl.max(group_keys, axis=1)[:, None]
        chosen = chosen | is_best
        group_keys = tl.where(is_best, -1, group_keys)
    return chosen


@triton.jit
def ordered(number, index):
    """A key, not negative, that rises with `number` and among equals falls with `index` < 2¹⁶; NaN counts as −∞."""
    # Adding zero makes −0 the same as 0.
    number = tl.where(number == number, number, float("-inf")) + 0.0
    bits = number.to(tl.int32, bitcast=True)
    # The integers of negative floats fall as these rise: all but their sign is turned.
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000
    return rising * 65536 + (65535 - index)


@triton.jit
def id_of(key):
    """The index that a key was made of."""
    return (65535 - key % 65536).to(tl.int32)
