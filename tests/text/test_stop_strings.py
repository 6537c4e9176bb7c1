"""Stop strings against the plainest search there is, for any split of the text."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd.text.stop_strings import StopMatch, StopStrings

# Few letters, so that stop strings overlap with the text, with one another and with themselves.
TEXTS = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the first stop string is complete, and which (of several the longest)."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


def pieces_of(text: str, data: st.DataObject) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(text=TEXTS, stops=STOPS, include=st.booleans(), data=st.data())
def test_any_split_ends_at_the_first_stop(text: str, stops: list[str], include: bool, data: st.DataObject) -> None:
    matcher = StopStrings(stops, include=include)
    shown, stop = "", None
    for piece in pieces_of(text, data):
        match = matcher.push(piece)
        shown += match.text
        stop = match.stop
        if stop is not None:
            break
    shown += matcher.finish()
    found = first_stop(text, stops)
    if found is None:
        assert (shown, stop) == (text, None)
    else:
        end, expected = found
        assert (shown, stop) == (text[: end if include else end - len(expected)], expected)


@given(text=TEXTS, stops=STOPS, data=st.data())
def test_only_the_longest_possible_beginning_of_a_stop_is_held_back(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    found = first_stop(text, stops)
    text = text[: found[0] - 1] if found else text
    matcher = StopStrings(stops)
    shown = "".join(matcher.push(piece).text for piece in pieces_of(text, data))
    beginnings = {stop[:n] for stop in stops for n in range(len(stop))} | {""}
    longest = max((beginning for beginning in beginnings if text.endswith(beginning)), key=len)
    assert (shown, matcher.finish()) == (text.removesuffix(longest), longest)


@pytest.mark.parametrize("stop", ["".join(letters) for size in (1, 2, 3, 4) for letters in product("ab", repeat=size)])
def test_every_short_text_ends_at_the_first_stop(stop: str) -> None:
    for text in map("".join, product("ab", repeat=8)):
        matcher = StopStrings([stop])
        matches = []
        for character in text:
            matches.append(matcher.push(character))
            if matches[-1].stop is not None:
                break
        shown = "".join(match.text for match in matches) + matcher.finish()
        assert shown == text.partition(stop)[0]
        assert (matches[-1].stop == stop) == (stop in text)


def test_nothing_is_held_back_if_stops_are_shown() -> None:
    matcher = StopStrings(["END"], include=True)
    assert [matcher.push(piece).text for piece in ("E", "N", "D and")] == ["E", "N", "D"]


def test_stop_completed_while_inactive_does_not_count_but_one_begun_does() -> None:
    matcher = StopStrings(["aba"])
    assert matcher.push("aba", is_active=False) == StopMatch("ab", None)
    assert matcher.push("ba") == StopMatch("", "aba")


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stop cannot contain an empty string\."):
        StopStrings(["a", ""])
