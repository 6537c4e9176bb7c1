"""/v1/models, /tokenize and /detokenize."""

from pathlib import Path

import openai.types
import pytest

from llmd.protocol.control import Stage, SystemState
from tests.server.fake_engine import MAX_MODEL_LEN, application, run


def test_models_are_listed_and_found_by_name(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            status, listed = await app.get("/v1/models")
            assert (status, listed["object"]) == (200, "list")
            assert [card["id"] for card in listed["data"]] == ["tiny", "org/tiny"]
            for card in listed["data"]:
                openai.types.Model.model_validate(card, strict=True)
                assert card["max_model_len"] == MAX_MODEL_LEN
                assert card["permission"][0]["object"] == "model_permission"
                assert await app.get(f"/v1/models/{card['id']}") == (200, card)
            status, answer = await app.get("/v1/models/org/other")
            assert (status, answer["error"]["code"]) == (404, "model_not_found")

    run(main)


def test_models_are_listed_while_they_load(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            app.server.text = None
            status, listed = await app.get("/v1/models")
            assert status == 200
            assert listed["data"][0]["max_model_len"] is None

    run(main)


def test_a_prompt_becomes_tokens_and_text_again(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            prompt = "aö<|im_end|>"
            status, answer = await app.post("/tokenize", {"prompt": prompt, "model": "tiny"})
            assert status == 200
            tokens = app.engine.tokenizer.encode(prompt, add_special_tokens=True)
            assert answer == {
                "count": 4,
                "max_model_len": MAX_MODEL_LEN,
                "tokens": tokens,
                "token_strs": None,
            }
            status, answer = await app.post("/tokenize", {"prompt": prompt, "return_token_strs": True})
            assert answer["token_strs"] == ["a", "\ufffd", "\ufffd", "<|im_end|>"]
            assert await app.post("/detokenize", {"tokens": tokens[:3]}) == (200, {"prompt": "aö"})

    run(main)


@pytest.mark.parametrize("length", [3, 20_000])
def test_messages_become_the_tokens_that_chat_would_use(tiny_model_dir: Path, length: int) -> None:
    """Short texts are encoded in the event loop, long ones in a thread."""

    async def main() -> None:
        async with application(tiny_model_dir, max_model_len=100_000) as app:
            messages = [{"role": "user", "content": "x" * length}]
            _, answer = await app.post("/tokenize", {"messages": messages})
            await app.chat(messages=messages)
            assert answer["tokens"] == app.engine.received[0].prompt_token_ids
            assert answer["count"] == len(answer["tokens"])

    run(main, uses_threads=True)


def test_what_cannot_be_encoded_is_refused(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            for path, body, param in (
                ("/tokenize", {}, "prompt"),
                ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
                ("/tokenize", {"prompt": 5}, "prompt"),
                ("/tokenize", {"messages": []}, "messages"),
                ("/tokenize", {"prompt": "a", "token": True}, "token"),
                ("/detokenize", {}, "tokens"),
                ("/detokenize", {"tokens": "a"}, "tokens"),
                ("/detokenize", {"tokens": [264]}, "tokens.0"),
                ("/detokenize", {"tokens": [1, -1]}, "tokens.1"),
            ):
                status, answer = await app.post(path, body)
                assert (status, answer["error"]["param"]) == (400, param), body
            assert (await app.post("/tokenize", {"prompt": "a", "model": "other"}))[0] == 404
            app.server.text = None
            app.server.state.update(SystemState(stage=Stage.LOADING))
            assert (await app.post("/tokenize", {"prompt": "a"}))[0] == 503

    run(main)
