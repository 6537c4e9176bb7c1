"""Tokenizers from model folders: what the files say is what happens."""

import threading
from pathlib import Path
from typing import Any

import pytest

from llmd.errors import InvalidRequest, StartupFailed, UnsupportedModel
from llmd.text.tokenizer import Tokenizer
from tests.text.conftest import WriteFolder, byte_fallback_json, byte_level_json


@pytest.mark.parametrize("text", ["The quick brown fox", " two  spaces ", "你好 😀\n", "", "a<b>c"])
def test_text_comes_back(byte_level: Tokenizer, byte_fallback: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, byte_fallback):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=True)) == text


def test_special_tokens_in_the_text_are_recognised(byte_level: Tokenizer) -> None:
    start, end = byte_level.token_id("<|im_start|>"), byte_level.token_id("<|im_end|>")
    token_ids = byte_level.encode("<|im_start|>x<|im_end|>", add_special_tokens=False)
    assert (token_ids[0], token_ids[-1], len(token_ids)) == (start, end, 3)
    assert {start, end} <= byte_level.special_ids


def test_bos_is_added_only_where_asked(byte_fallback: Tokenizer) -> None:
    bos = byte_fallback.token_id("<s>")
    without = byte_fallback.encode("fox", add_special_tokens=False)
    assert byte_fallback.encode("fox", add_special_tokens=True) == [bos, *without]


@pytest.mark.parametrize(
    ("config", "num_before", "num_after"),
    [
        ({}, 1, 0),
        ({"add_bos_token": None}, 1, 0),
        ({"add_bos_token": False}, 0, 0),
        ({"add_bos_token": True, "add_eos_token": True}, 1, 1),
        ({"add_eos_token": True}, 0, 1),
    ],
)
def test_tokenizer_config_has_the_last_word_on_bos_and_eos(
    write_folder: WriteFolder, config: dict[str, Any], num_before: int, num_after: int
) -> None:
    named = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    tokenizer = Tokenizer.load(write_folder(tokenizer=byte_fallback_json(), tokenizer_config=named | config))
    plain = tokenizer.encode("fox", add_special_tokens=False)
    assert tokenizer.encode("fox", add_special_tokens=True) == [1] * num_before + plain + [2] * num_after


def test_end_of_sequence_is_what_any_file_says(write_folder: WriteFolder) -> None:
    folder = write_folder(
        tokenizer=byte_level_json(),
        tokenizer_config={"eos_token": "<|im_end|>"},
        config={"eos_token_id": 0, "text_config": {"eos_token_id": 7}},
        generation_config={"eos_token_id": [5, 0]},
    )
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_token_ids == {0, 5, 7, tokenizer.token_id("<|im_end|>")}


def test_special_tokens_map_fills_what_the_config_leaves_open(write_folder: WriteFolder) -> None:
    folder = write_folder(
        tokenizer=byte_level_json(),
        tokenizer_config={"bos_token": None, "eos_token": "<|im_end|>"},
        special_tokens_map={"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|endoftext|>"},
    )
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_declared_tokens_become_whole_tokens(write_folder: WriteFolder) -> None:
    description = byte_level_json()
    size = len(description["model"]["vocab"]) + 1
    declared = {
        str(size): {"content": "<|tool|>", "special": True, "normalized": False},
        "9000": {"content": "<|elsewhere|>", "special": True, "normalized": False},
    }
    tokenizer = Tokenizer.load(write_folder(tokenizer=description, tokenizer_config={"added_tokens_decoder": declared}))
    assert tokenizer.encode("<|tool|>", add_special_tokens=False) == [size]
    assert tokenizer.vocab_size == size + 1
    assert size in tokenizer.special_ids
    # An id that the model may have no row for must not come out of plain text.
    assert max(tokenizer.encode("<|elsewhere|>", add_special_tokens=False)) < size


def test_cutting_that_the_file_asks_for_is_not_done(write_folder: WriteFolder) -> None:
    description = byte_level_json()
    description["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer = Tokenizer.load(write_folder(tokenizer=description))
    assert len(tokenizer.encode("0123456789", add_special_tokens=False)) > 3


def test_bytes_of_tokens_make_the_bytes_of_the_text(byte_level: Tokenizer) -> None:
    text = "quick 😀 你<|im_end|>"
    token_ids = byte_level.encode(text, add_special_tokens=False)
    assert b"".join(map(byte_level.token_bytes, token_ids)).decode() == text


def test_byte_tokens_stand_for_one_byte(byte_fallback: Tokenizer) -> None:
    token_ids = byte_fallback.encode("😀", add_special_tokens=False)
    assert b"".join(map(byte_fallback.token_bytes, token_ids)) == " 😀".encode()
    assert byte_fallback.token_text(token_ids[-1]) == "\ufffd"


def test_many_texts_at_once_are_as_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["fox", "", "the quick", "😀"]
    assert tokenizer.encode_many(texts, add_special_tokens=True) == [
        tokenizer.encode(text, add_special_tokens=True) for text in texts
    ]


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("a\ud800", add_special_tokens=True)
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode_many(["a", "\udfff"], add_special_tokens=True)


def test_threads_get_the_same_tokens(byte_level: Tokenizer) -> None:
    text = "The quick brown fox 😀 " * 50
    expected = byte_level.encode(text, add_special_tokens=False)
    results: list[bool] = []

    def work() -> None:
        for _ in range(10):
            token_ids = byte_level.encode(text, add_special_tokens=False)
            results.append(token_ids == expected and byte_level.decode(token_ids) == text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 40


def test_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StartupFailed, match=r"tokenizer\.json is missing.*save_pretrained"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}'])
def test_broken_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(StartupFailed, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]},
    ],
)
def test_decoder_that_cannot_be_streamed_is_refused(write_folder: WriteFolder, decoder: dict[str, Any] | None) -> None:
    with pytest.raises(UnsupportedModel, match="decoder"):
        Tokenizer.load(write_folder(tokenizer=byte_level_json() | {"decoder": decoder}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_transformers_reads_the_folder_in_the_same_way(kind: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    folder: Path = request.getfixturevalue(f"{kind}_folder")
    ours = Tokenizer.load(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in ("The quick brown fox", "<s> x</s>", " 你好 😀\n\n", "<|im_start|>user\nHi<|im_end|>\n<tool call>"):
        for special in (True, False):
            token_ids = ours.encode(text, add_special_tokens=special)
            assert token_ids == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(token_ids, skip_special_tokens=special) == theirs.decode(
                token_ids, skip_special_tokens=special, clean_up_tokenization_spaces=False
            )
    assert theirs.eos_token_id in ours.eos_token_ids
    assert set(theirs.all_special_ids) <= ours.special_ids
