"""One answer's text: the same for every way in which its tokens arrive (contract C6)."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd.protocol.generation import FinishReason
from llmd.text.detokenizer import Detokenizer
from llmd.text.output import TextDelta, TextOutput
from llmd.text.tokenizer import Tokenizer

TEXTS = st.text(st.sampled_from("the fox \nab.é你好😀") | st.characters(codec="utf-8"), max_size=30)


@st.composite
def answers(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Tokens of real text with junk in between: parts of characters, special tokens, ids that do not exist."""
    token_ids: list[int] = []
    for text, junk in draw(st.lists(st.tuples(TEXTS, st.lists(st.integers(0, 700), max_size=4)), max_size=3)):
        token_ids += tokenizer.encode(text, add_special_tokens=False)[: draw(st.integers(0, 30))] + junk
    return token_ids


@st.composite
def stop_strings(draw: st.DrawFn, text: str) -> list[str]:
    """Stop strings that are mostly cut out of the text itself."""
    stops = draw(st.lists(st.text("the fo\nab\ufffd😀", min_size=1, max_size=3), max_size=1))
    for _ in range(draw(st.integers(0, 3)) if text else 0):
        start = draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + draw(st.integers(1, 6))])
    return stops


def split(draw: Any, token_ids: Sequence[int]) -> list[Sequence[int]]:
    cuts = sorted(draw(st.lists(st.integers(0, max(len(token_ids) - 1, 0)), max_size=8)))
    return [token_ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(token_ids)], strict=True)]


def run(output: TextOutput, steps: Sequence[Sequence[int]], finish: FinishReason | None) -> list[TextDelta]:
    deltas = []
    for index, step in enumerate(steps):
        deltas.append(output.push(step, finish=finish if index == len(steps) - 1 else None))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def summary(deltas: list[TextDelta]) -> tuple[Any, ...]:
    return (
        "".join(delta.text for delta in deltas),
        sum(delta.num_tokens for delta in deltas),
        [offset for delta in deltas for offset in delta.text_offsets],
        deltas[-1].finish_reason,
        deltas[-1].stop_reason,
    )


def plain_answer(
    tokenizer: Tokenizer, token_ids: list[int], finish: FinishReason, *, stop: list[str], include: bool, min_tokens: int
) -> tuple[str, int, FinishReason, str | None]:
    """The definition, character by character: text, accepted tokens, finish reason and stop string."""
    detokenizer = Detokenizer(tokenizer.vocabulary)
    is_hidden = finish is FinishReason.STOP and not include
    pieces = [*map(detokenizer.push, token_ids[:-1] if is_hidden else token_ids)]
    pieces += [""] * (len(token_ids) - len(pieces))
    pieces.append(detokenizer.finish())
    text = ""
    for num_tokens, piece in enumerate(pieces, start=1):
        for character in piece:
            text += character
            found = [one for one in stop if text.endswith(one)]
            accepted = min(num_tokens, len(token_ids))
            if found and accepted > min_tokens:
                longest = max(found, key=len)
                return text if include else text.removesuffix(longest), accepted, FinishReason.STOP, longest
    return text, len(token_ids), finish, None


@given(data=st.data())
def test_text_tokens_and_ending_do_not_depend_on_the_split(tokenizer: Tokenizer, data: st.DataObject) -> None:
    token_ids = data.draw(answers(tokenizer))
    stop = data.draw(stop_strings(tokenizer.decode(token_ids)))
    include = data.draw(st.booleans())
    min_tokens = data.draw(st.sampled_from([0, 0, 1, 3, 10]))
    finish = data.draw(st.sampled_from([FinishReason.LENGTH, FinishReason.STOP]))

    def answer(steps: Sequence[Sequence[int]]) -> tuple[Any, ...]:
        output = TextOutput(
            tokenizer,
            prompt_token_ids=[],
            stop=stop,
            include_stop_str_in_output=include,
            min_tokens=min_tokens,
        )
        return summary(run(output, steps, finish))

    whole = answer([token_ids])
    assert whole == answer(split(data.draw, token_ids)) == answer([[token_id] for token_id in token_ids] or [[]])
    text, num_tokens, offsets, finish_reason, stop_reason = whole
    expected = plain_answer(tokenizer, token_ids, finish, stop=stop, include=include, min_tokens=min_tokens)
    assert (text, num_tokens, finish_reason, stop_reason) == expected
    assert len(offsets) == num_tokens
    assert offsets == sorted(offsets)


def push_all(tokenizer: Tokenizer, text: str, finish: FinishReason | None, **options: Any) -> TextDelta:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    return TextOutput(tokenizer, prompt_token_ids=[], **options).push(token_ids, finish=finish)


def test_tokens_behind_a_stop_string_are_not_counted(byte_level: Tokenizer) -> None:
    delta = push_all(byte_level, "x#y and more", None, stop=["#"])
    assert (delta.text, delta.num_tokens, delta.finish_reason, delta.stop_reason) == ("x", 2, FinishReason.STOP, "#")


def test_stop_token_is_counted_and_not_shown(byte_level: Tokenizer) -> None:
    eos = byte_level.token_id("<|im_end|>")
    delta = push_all(byte_level, "x<|im_end|>", FinishReason.STOP, skip_special_tokens=False)
    assert (delta.text, delta.num_tokens, delta.stop_reason) == ("x", 2, None)
    named = push_all(byte_level, "x<|im_end|>", FinishReason.STOP, stop_token_ids=[eos])
    assert (named.text, named.stop_reason) == ("x", eos)
    shown = push_all(
        byte_level, "x<|im_end|>", FinishReason.STOP, skip_special_tokens=False, include_stop_str_in_output=True
    )
    assert shown.text == "x<|im_end|>"


def test_end_of_sequence_that_did_not_end_the_answer_is_an_ordinary_token(byte_level: Tokenizer) -> None:
    text = "x<|im_end|>y"
    assert push_all(byte_level, text, FinishReason.LENGTH, skip_special_tokens=False).text == text
    assert push_all(byte_level, text, FinishReason.LENGTH).text == "xy"


def test_what_was_held_back_comes_out_at_the_end(byte_level: Tokenizer) -> None:
    output = TextOutput(byte_level, prompt_token_ids=[], stop=["###"])
    hashes = byte_level.encode("#", add_special_tokens=False)
    assert output.push(hashes, finish=None).text == ""
    assert output.push(hashes, finish=FinishReason.LENGTH).text == "##"


def test_text_offsets_are_where_each_token_began(byte_level: Tokenizer) -> None:
    delta = push_all(byte_level, "a😀b", FinishReason.LENGTH)
    assert delta.text_offsets == [0, 1, 1, 1, 1, 2]


def test_answer_to_no_tokens_is_empty(tokenizer: Tokenizer) -> None:
    delta = TextOutput(tokenizer, prompt_token_ids=[1]).push([], finish=FinishReason.LENGTH)
    assert (delta.text, delta.num_tokens, delta.finish_reason) == ("", 0, FinishReason.LENGTH)


def test_nothing_may_follow_the_end(byte_level: Tokenizer) -> None:
    output = TextOutput(byte_level, prompt_token_ids=[])
    output.push([], finish=FinishReason.ERROR)
    with pytest.raises(RuntimeError, match="has ended"):
        output.push([5], finish=None)
