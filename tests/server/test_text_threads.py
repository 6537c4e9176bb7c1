"""Long texts run beside the event loop, few at a time, and shorter ones overtake them."""

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import trio_test

from llmd.errors import Overloaded
from llmd.server.text_threads import LONG_FROM, MAX_PENDING, NUM_LONG_THREADS, NUM_THREADS, THREAD_FROM, TextThreads
from llmd.server.tokenization import MAX_COUNTED_CHARACTERS
from llmd.text import chat_template
from llmd.text.chat_template import ChatTemplate
from llmd.text.tokenizer import Tokenizer
from tests.server.fake_engine import application, run
from tests.server.live import SOON, until


class Work:
    """Blocks its thread until it is released, and counts."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.num_begun = 0
        self.num_ended = 0

    def __call__(self) -> None:
        self.num_begun += 1
        assert self.release.wait(SOON)
        self.num_ended += 1


@trio_test
async def test_a_moments_work_needs_no_thread() -> None:
    assert await TextThreads().run(THREAD_FROM - 1, threading.get_ident) == threading.get_ident()
    assert await TextThreads().run(THREAD_FROM, threading.get_ident) != threading.get_ident()


@trio_test
async def test_shorter_texts_overtake_long_ones() -> None:
    threads, long, medium = TextThreads(), Work(), Work()
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(threads.run, LONG_FROM, long)
        await until(lambda: long.num_begun == NUM_LONG_THREADS)
        for _ in range(100):
            nursery.start_soon(threads.run, LONG_FROM - 1, medium)
        await until(lambda: medium.num_begun == NUM_THREADS)
        assert await threads.run(THREAD_FROM - 1, lambda: "small") == "small"
        medium.release.set()
        await until(lambda: medium.num_ended == 100)
        assert (long.num_begun, long.num_ended) == (NUM_LONG_THREADS, 0)
        long.release.set()
    assert long.num_ended == 100


@trio_test
async def test_a_client_that_leaves_neither_waits_nor_makes_room_for_one_thread_more() -> None:
    threads, work = TextThreads(), Work()
    with trio.fail_after(SOON):
        for _ in range(5):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(threads.run, LONG_FROM, work)
                    await until(lambda: work.num_begun == 1)
                    scope.cancel()
    assert (work.num_begun, work.num_ended) == (1, 0)
    work.release.set()
    await threads.run(LONG_FROM, lambda: None)
    assert (work.num_begun, work.num_ended) == (1, 1)


@trio_test
async def test_what_waits_is_bounded() -> None:
    threads, work = TextThreads(), Work()
    async with trio.open_nursery() as nursery:
        # the first may be of any size
        nursery.start_soon(threads.run, MAX_PENDING + 1, work)
        await until(lambda: work.num_begun == 1)
        with pytest.raises(Overloaded, match="wait to be tokenized"):
            await threads.run(THREAD_FROM, lambda: None)
        assert await threads.run(THREAD_FROM - 1, lambda: "small") == "small"
        work.release.set()
    assert await threads.run(MAX_PENDING, lambda: "next") == "next"


def test_other_threads_go_on_while_a_text_is_tokenized(tiny_model_dir: Path) -> None:
    """The library's own `encode` holds the interpreter lock for as long as it takes: a second for a megabyte."""
    tokenizer = Tokenizer.load(tiny_model_dir)
    text = "The quick brown fox. " * 50_000
    done = threading.Event()

    def encode() -> None:
        tokenizer.encode(text, add_special_tokens=False)
        done.set()

    thread = threading.Thread(target=encode)
    num_turns = 0
    thread.start()
    while not done.is_set():
        num_turns += 1
        time.sleep(0)
    thread.join()
    # one before it takes the lock, and one when it gives it back
    assert num_turns > 10


def test_a_conversation_counts_with_all_that_goes_into_it(tiny_model_dir: Path) -> None:
    """Not only its messages' text: documents, variables of the template and tool calls take time too."""
    places: list[int] = []

    async def main() -> None:
        async with application(tiny_model_dir) as app:
            render = ChatTemplate.render

            def render_noting_place(*arguments: Any, **options: Any) -> str:
                places.append(threading.get_ident())
                return render(*arguments, **options)

            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(ChatTemplate, "render", render_noting_place)
                await app.chat(max_tokens=1)
                await app.chat(max_tokens=1, documents=[{"text": "x" * THREAD_FROM}])
                await app.chat(max_tokens=1, chat_template_kwargs={"x": ["y"] * THREAD_FROM})

    run(main, uses_threads=True)
    assert [place == threading.get_ident() for place in places] == [True, False, False]


def test_a_text_that_cannot_fit_is_not_tokenized(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            text = app.server.text
            assert text is not None
            limit = text.max_model_len * text.tokenizer.longest_token
            status, answer = await app.post("/v1/completions", {"prompt": "x" * (limit + 1)})
            assert status == 400
            assert answer["error"]["code"] == "context_length_exceeded"
            assert "maximum context length is" in answer["error"]["message"]
            assert f"at most {limit} characters" in answer["error"]["message"]
            # but it may be asked how many tokens it has
            assert (await app.post("/tokenize", {"prompt": "x" * 9000}))[1]["count"] == 9000
            status, answer = await app.post("/tokenize", {"prompt": "x" * (MAX_COUNTED_CHARACTERS + 1)})
            assert answer["error"]["code"] == "context_length_exceeded"

    run(main, uses_threads=True)


def test_no_text_that_fits_is_longer_than_the_limit(tiny_model_dir: Path) -> None:
    tokenizer = Tokenizer.load(tiny_model_dir)
    for token_id in range(tokenizer.vocab_size):
        assert len(tokenizer.token_text(token_id)) <= tokenizer.longest_token


# --- a template that would take for ever


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it takes too long"),
        ("{% set ns = namespace(x='ab') %}{% for _ in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "too"),
        ("{{ 'x' * 99999999999 }}", "too large"),
        ("{{ messages.__class__.__mro__ }}", "failed"),
        ("{{ messages.append(1) }}", "failed"),
        ("{{ messages.__class__ }}", "empty prompt"),
    ],
)
def test_the_limits_of_a_template_hold_behind_http(
    tiny_model_dir: Path, template: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "_TIME_LIMIT", 0.2)

    async def main() -> None:
        async with application(tiny_model_dir) as app, trio.open_nursery() as nursery:
            text = app.server.text
            assert text is not None
            app.server.text = dataclasses.replace(
                text, chat_template=ChatTemplate({"default": template}, special_tokens={})
            )
            answers: list[tuple[int, object]] = []

            async def ask() -> None:
                body = {"messages": [{"role": "user", "content": "x" * THREAD_FROM}]}
                answers.append(await app.post("/v1/chat/completions", body))

            nursery.start_soon(ask)
            # the event loop goes on meanwhile
            assert (await app.get("/health/live"))[0] == 200
            await until(lambda: bool(answers))
            status, answer = answers[0]
            assert status == 400
            assert words in str(answer)

    run(main, uses_threads=True)
