"""Which instructions of a kernel's machine code can come again: those in loops. Knows no instruction set."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, and where it goes from there."""

    name: str
    # The place in the code that a branch may lead to; the next one if `goes_on`.
    label: str = ""  # in front of this instruction, or none
    target: str = ""
    goes_on: bool = True
    # Of the Python source: "file:line", or none.
    source: str = ""


def in_loops(code: Sequence[Instruction]) -> list[bool]:
    """Whether each instruction can follow itself.

    That a branch leads back does not tell: what is seldom run is put behind the rest and comes back from there.
    """
    first_of = _blocks(code)
    starts = sorted(set(first_of))
    labels = {instruction.label: place for place, instruction in enumerate(code) if instruction.label}
    next_of: dict[int, list[int]] = {}
    for start, stop in zip(starts, [*starts[1:], len(code)], strict=True):
        last = code[stop - 1]
        followers = [labels[last.target]] if last.target in labels else []
        next_of[start] = followers + ([stop] if last.goes_on and stop < len(code) else [])
    looping = {start for start in starts if _comes_back(start, next_of)}
    return [start in looping for start in first_of]


def _blocks(code: Sequence[Instruction]) -> list[int]:
    """For each instruction the first one of its block: between them nothing branches and nothing is branched to."""
    first_of, start = [], 0
    for place, instruction in enumerate(code):
        before = code[place - 1] if place else instruction
        if place and (instruction.label or before.target or not before.goes_on):
            start = place
        first_of.append(start)
    return first_of


def _comes_back(start: int, next_of: dict[int, list[int]]) -> bool:
    seen: set[int] = set()
    ahead = list(next_of[start])
    while ahead:
        block = ahead.pop()
        if block == start:
            return True
        if block not in seen:
            seen.add(block)
            ahead += next_of[block]
    return False
