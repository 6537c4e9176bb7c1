"""`scale_logits` in Triton. `scaled` is shared with the linear that draws, so that both give the same bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice


def scale_logits(products: Tensor, *, divisor: float = 1.0, soft_cap: float | None = None) -> Tensor:
    """One launch."""
    products = products if products.is_contiguous() else products.contiguous()
    logits = torch.empty(products.shape, dtype=torch.float32, device=products.device)
    size = products.numel()
    if size:
        scale_logits_kernel[(triton.cdiv(size, 2048),)](
            products,
            logits,
            size,
            divisor,
            1.0 if soft_cap is None else soft_cap,
            DIVIDES=divisor != 1,
            CAPS=soft_cap is not None,
            BLOCK=2048,
            num_warps=4,
        )
    return logits


@triton.jit
def scaled(products, divisor, soft_cap, DIVIDES: tl.constexpr, CAPS: tl.constexpr):
    """products float32, any shape → logits."""
    if DIVIDES:
        products = products / divisor
    if CAPS:
        products = libdevice.tanh(products / soft_cap) * soft_cap
    return products


@triton.jit
def scale_logits_kernel(
    products, logits, size, divisor, soft_cap, DIVIDES: tl.constexpr, CAPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: (blocks of all numbers,)."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    given = tl.load(products + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(logits + places, scaled(given, divisor, soft_cap, DIVIDES, CAPS), mask=mask)
