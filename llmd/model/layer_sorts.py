"""Which layers launch the same kernels: those that differ in nothing but their tensors' numbers. Knows no layer."""

from collections.abc import Hashable
from dataclasses import fields, is_dataclass

from torch import Tensor


def sort_of(part: object) -> Hashable:
    """Equal for layers, or parts of them, that no kernel can tell apart before it reads their numbers."""
    if isinstance(part, Tensor):
        return part.shape, part.stride(), part.dtype
    if is_dataclass(part):
        return (type(part), *(sort_of(getattr(part, field.name)) for field in fields(part)))
    assert isinstance(part, Hashable)
    return part
