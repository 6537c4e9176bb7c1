"""Pieces of a stream, put together, are the text of the whole; half a character is never shown."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from llmd.text.detokenizer import Detokenizer
from llmd.text.tokenizer import Tokenizer

TEXTS = st.text(st.sampled_from("the fox ab  \n.,12é你好界😀👩‍🚀̈ק") | st.characters(codec="utf-8"), max_size=40)
# Any id of the vocabularies in conftest.py, some above them, and often the bytes of characters.
ANY_IDS = st.lists(st.integers(0, 700), max_size=40)


def backend_of(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def stream(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    return [*map(detokenizer.push, token_ids), detokenizer.finish()]


@given(token_ids=ANY_IDS, skip=st.booleans())
def test_stream_of_byte_level_tokens_is_what_the_library_decodes(
    byte_level: Tokenizer, byte_level_folder: Path, token_ids: list[int], skip: bool
) -> None:
    whole = backend_of(byte_level_folder).decode(token_ids, skip_special_tokens=skip)
    pieces = stream(Detokenizer(byte_level.vocabulary, skip_special_tokens=skip), token_ids)
    assert "".join(pieces) == byte_level.decode(token_ids, skip_special_tokens=skip) == whole


@given(token_ids=ANY_IDS, skip=st.booleans())
def test_stream_of_byte_fallback_tokens_keeps_what_the_library_decodes(
    byte_fallback: Tokenizer, byte_fallback_folder: Path, token_ids: list[int], skip: bool
) -> None:
    """Where bytes are wrong the library gives up a whole run of them; every other character must be the same."""
    whole = backend_of(byte_fallback_folder).decode(token_ids, skip_special_tokens=skip)
    text = "".join(stream(Detokenizer(byte_fallback.vocabulary, skip_special_tokens=skip), token_ids))
    if "\ufffd" not in whole:
        assert text == whole
    else:
        assert "\ufffd" in text
        kept = iter(text)
        assert all(character in kept for character in whole if character != "\ufffd")


@given(text=TEXTS, data=st.data())
def test_prompt_and_answer_read_as_one_text(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    """Wherever a text is cut into prompt and answer, the answer is the rest of it."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    cut = data.draw(st.integers(0, len(token_ids)))
    prompt, answer = token_ids[:cut], token_ids[cut:]
    detokenizer = Detokenizer(tokenizer.vocabulary, prompt_token_ids=prompt)
    whole = tokenizer.decode(token_ids)
    # A character that the cut goes through is the answer's, and U+FFFD in the prompt alone.
    known = tokenizer.decode(prompt)
    known = known.removesuffix("\ufffd") if not whole.startswith(known) else known
    assert known + "".join(stream(detokenizer, answer)) == whole


@given(text=TEXTS)
def test_no_piece_shows_a_part_of_a_character(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    shown = ""
    for piece in stream(Detokenizer(tokenizer.vocabulary), token_ids):
        shown += piece
        assert tokenizer.decode(token_ids).startswith(shown)


def test_emoji_appears_with_its_last_byte(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("a😀b", add_special_tokens=False)
    assert stream(Detokenizer(byte_level.vocabulary), token_ids) == ["a", "", "", "", "😀", "b", ""]


def test_unfinished_character_at_the_end_is_replaced(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("a😀", add_special_tokens=False)[:-1]
    assert stream(Detokenizer(byte_level.vocabulary), token_ids) == ["a", "", "", "", "\ufffd"]


def test_first_word_keeps_its_space_after_a_prompt(byte_fallback: Tokenizer) -> None:
    the = byte_fallback.encode("the", add_special_tokens=False)
    bos = [byte_fallback.token_id("<s>") or 0]
    after_text = Detokenizer(byte_fallback.vocabulary, prompt_token_ids=[*bos, *the])
    after_nothing = Detokenizer(byte_fallback.vocabulary, prompt_token_ids=bos)
    assert "".join(stream(after_text, the)) == " the"
    assert "".join(stream(after_nothing, the)) == "the"


@pytest.mark.parametrize("kind", ["byte_fallback", "metaspace"])
def test_what_has_no_text_does_not_count_as_the_start(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    the = tokenizer.encode("the", add_special_tokens=False)
    no_token = tokenizer.vocab_size
    assert tokenizer.decode([no_token, *the]) == "the"


def test_special_tokens_are_shown_only_on_request(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("a<|im_end|>b<tool call>", add_special_tokens=False)
    assert byte_level.decode(token_ids) == "ab<tool call>"
    assert byte_level.decode(token_ids, skip_special_tokens=False) == "a<|im_end|>b<tool call>"


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**63])
def test_ids_that_are_no_tokens_have_no_text(tokenizer: Tokenizer, token_id: int) -> None:
    assert tokenizer.decode([token_id]) == tokenizer.token_text(token_id) == ""


def test_prompt_of_unfinished_character_is_dropped_if_the_answer_does_not_finish_it(byte_level: Tokenizer) -> None:
    begun = byte_level.encode("😀", add_special_tokens=False)[:2]
    other = byte_level.encode("x", add_special_tokens=False)
    assert stream(Detokenizer(byte_level.vocabulary, prompt_token_ids=begun), other) == ["x", ""]
    assert stream(Detokenizer(byte_level.vocabulary, prompt_token_ids=begun), []) == [""]
