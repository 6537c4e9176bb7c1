"""Finds stop strings in a growing text and holds back what may become one. Knows nothing of tokens.

The stop that counts is the one that is complete first, as a client who reads character by character would see it;
of several that are complete at the same character, the longest. So the result does not depend on how the text was
split. Each stop string has a Knuth-Morris-Pratt automaton (SIAM J. Comput. 6, 1977): constant work a character.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """`text` may be shown; `stop` is the stop string that ended it, None while there was none."""

    text: str
    stop: str | None


class _Automaton:
    """Follows one stop string: `num_matched` is the length of its longest prefix that the text ends with."""

    __slots__ = ("_fallback", "num_matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._fallback = _fallback_lengths(stop)

    def step(self, character: str) -> bool:
        """Takes one character; True if the stop string is complete."""
        stop, matched = self.stop, self.num_matched
        if matched == len(stop):
            matched = self._fallback[matched]
        while matched and stop[matched] != character:
            matched = self._fallback[matched]
        if stop[matched] == character:
            matched += 1
        self.num_matched = matched
        return matched == len(stop)

    @property
    def num_pending(self) -> int:
        """Characters at the text's end that may still become the stop string."""
        return self.num_matched if self.num_matched < len(self.stop) else self._fallback[self.num_matched]


class StopStrings:
    """Text in, text that is safe to show out. After a match there must be no more pushes."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: the stop string itself is shown too, so nothing needs to be held back.

        Raises ValueError for an empty stop string.
        """
        if not all(stops):
            raise ValueError("stop cannot contain an empty string.")
        self._automata = [_Automaton(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._include = include
        self._held = ""

    def push(self, text: str, *, is_active: bool = True) -> StopMatch:
        """Adds text. While not active, a stop string that is completed does not count; one that is only begun may."""
        if not self._held and self._first_characters.isdisjoint(text) and self._is_idle():
            return StopMatch(text, None)
        text_start = len(self._held)
        buffer = self._held + text
        for position in range(text_start, len(buffer)):
            stop = self._step(buffer[position])
            if stop is not None and is_active:
                self._held = ""
                end = position + 1
                return StopMatch(buffer[: end if self._include else end - len(stop)], stop)
        num_held = 0 if self._include else max(automaton.num_pending for automaton in self._automata)
        num_shown = len(buffer) - num_held
        self._held = buffer[num_shown:]
        return StopMatch(buffer[:num_shown], None)

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        """Takes one character in every automaton; the longest stop string that it completes."""
        completed = [automaton.stop for automaton in self._automata if automaton.step(character)]
        return completed[0] if completed else None

    def _is_idle(self) -> bool:
        return not any(automaton.num_matched for automaton in self._automata)


def _fallback_lengths(stop: str) -> list[int]:
    """For each length n of a prefix of `stop`: the longest shorter prefix that it also ends with."""
    lengths = [0, 0]
    for n in range(2, len(stop) + 1):
        length = lengths[n - 1]
        while length and stop[length] != stop[n - 1]:
            length = lengths[length]
        lengths.append(length + 1 if stop[length] == stop[n - 1] else 0)
    return lengths
