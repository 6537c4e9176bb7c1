"""Messages → prompt, for the shapes of templates that models have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmd.errors import InvalidRequest, StartupFailed
from llmd.text.chat_template import ChatTemplate
from llmd.text.messages import milder_variants
from tests.text.conftest import WriteFolder
from tests.text.templates import ALTERNATING, CHATML, HEADERS, NO_SYSTEM, PARTS

TOKENS: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}


def talk(*turns: str) -> list[dict[str, Any]]:
    """Messages from "role: content" lines."""
    return [{"role": role, "content": content} for role, content in (turn.split(": ", 1) for turn in turns)]


def render(source: str, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate({"default": source}, special_tokens=TOKENS).render(messages, **options)


def test_chatml() -> None:
    assert render(CHATML, talk("user: Hi")) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(CHATML, talk("system: Be short.", "user: Hi"), add_generation_prompt=False) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_headers_and_special_tokens() -> None:
    assert render(HEADERS, talk("user:  Hi ")) == "<s><|start|>user<|end|>\n\nHi<|eot|><|start|>assistant<|end|>\n\n"


def test_template_that_wants_turns_gets_neighbours_merged() -> None:
    messages = talk("system: S", "user: a", "user: b", "assistant: c", "user: d")
    assert render(ALTERNATING, messages) == "<s>[INST] a\n\nb[/INST] c</s>[INST] S\n\nd[/INST]"
    assert len(messages) == 5


def test_system_message_in_the_middle_joins_the_user() -> None:
    messages = talk("system: S", "user: a", "assistant: b", "system: now", "user: c")
    assert render(ALTERNATING, messages) == "<s>[INST] a[/INST] b</s>[INST] S\n\nnow\n\nc[/INST]"


def test_template_without_system_role_gets_it_as_the_user() -> None:
    assert render(NO_SYSTEM, talk("system: S", "user: a")) == "<s><turn>user\nS\n\na<end>\n<turn>model\n"


def test_template_that_accepts_messages_gets_them_as_they_are() -> None:
    text = render(CHATML, talk("system: S", "user: a", "user: b"))
    assert text.count("<|im_start|>user") == 2


def test_refusal_says_what_the_template_says() -> None:
    with pytest.raises(InvalidRequest, match="refuses these messages: Conversation roles must alternate") as caught:
        render(NO_SYSTEM, talk("assistant: a", "user: b"))
    assert caught.value.param == "messages"


def test_messages_with_tool_calls_are_not_merged() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    for neighbour in (call, *talk("assistant: b")):
        with pytest.raises(InvalidRequest, match="alternate"):
            render(NO_SYSTEM, [*talk("user: a"), neighbour, call])


def test_messages_that_cannot_be_made_milder_are_tried_once() -> None:
    assert list(milder_variants(talk("user: a", "assistant: b"))) == []
    assert len(list(milder_variants(talk("system: a", "user: b", "user: c")))) == 2


def test_developer_is_system_unless_the_template_knows_better() -> None:
    assert "<|im_start|>system\nD<|im_end|>" in render(CHATML, talk("developer: D", "user: a"))
    assert render(PARTS, talk("developer: D")) == "DEVELOPER developer: D\n"


PARTS_MESSAGE = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}


def test_parts_become_lines_unless_the_template_goes_through_them() -> None:
    assert "<|im_start|>user\na\nb<|im_end|>" in render(CHATML, [PARTS_MESSAGE])
    assert render(PARTS, [PARTS_MESSAGE]) == "user: (a)(b)\n"


@pytest.mark.parametrize(
    ("source", "keeps"),
    [
        ("{% for m in messages %}{% for p in m['content'] %}[{{ p.text }}]{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% set c = m.content %}{% for p in c %}[{{ p.text }}]{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{{ m.content.split('x') | join }}{% endfor %}", False),
        ("{% for m in messages %}{% for t in m.tools or [] %}{% endfor %}{{ m.content }}{% endfor %}", False),
    ],
)
def test_how_content_is_read_is_seen_in_the_template(source: str, keeps: bool) -> None:
    assert render(source, [PARTS_MESSAGE]) == ("[a][b]" if keeps else "a\nb")


def test_part_that_is_not_text_is_refused_by_name() -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(InvalidRequest, match="'image_url'") as caught:
        render(CHATML, [*talk("user: a"), image])
    assert caught.value.param == "messages.1.content.0"


def test_no_content_is_empty() -> None:
    assert "<|im_start|>assistant\n<|im_end|>" in render(CHATML, [{"role": "assistant", "content": None}])


@pytest.mark.parametrize(
    ("source", "content", "end"),
    [
        (CHATML, "Once upon", "<|im_start|>assistant\nOnce upon"),
        (CHATML, "Once upon ", "<|im_start|>assistant\nOnce upon "),
        (HEADERS, " Once upon ", "<|end|>\n\nOnce upon"),
        (ALTERNATING, "a", "[/INST] a"),
    ],
)
def test_final_message_is_continued(source: str, content: str, end: str) -> None:
    messages = [*talk("user: a", "assistant: a", "user: a"), {"role": "assistant", "content": content}]
    prompt = render(source, messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt.endswith(end)
    assert render(source, messages, add_generation_prompt=False).startswith(prompt)


def test_final_message_of_parts_is_continued() -> None:
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(PARTS, [PARTS_MESSAGE], **options) == "user: (a)(b"


def test_continuing_and_a_new_message_exclude_each_other() -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(CHATML, talk("assistant: a"), add_generation_prompt=True, continue_final_message=True)
    assert caught.value.message == "Cannot set both `continue_final_message` and `add_generation_prompt` to True."


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        (CHATML, [], "text to continue"),
        (CHATML, [{"role": "assistant", "content": None}], "text to continue"),
        ("nothing", talk("assistant: a"), "does not show"),
    ],
)
def test_nothing_to_continue_is_refused(source: str, messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        render(source, messages, add_generation_prompt=False, continue_final_message=True)


def test_template_kwargs_and_tools_are_its_variables() -> None:
    tools = [{"type": "function", "function": {"name": "größe <b>"}}]
    text = render(PARTS, talk("user: a"), tools=tools, kwargs={"enable_thinking": False})
    assert text.endswith("<think></think>")
    assert '"name": "größe <b>"' in text


def test_template_kwargs_cannot_replace_the_messages() -> None:
    with pytest.raises(InvalidRequest, match="'messages'") as caught:
        render(CHATML, talk("user: a"), kwargs={"messages": []})
    assert caught.value.param == "chat_template_kwargs.messages"


@pytest.mark.parametrize("source", ["{{ messages[0].content.nothing.more }}", "{{ 1 + 'a' }}", "{{ messages[0] / 2 }}"])
def test_mistakes_in_a_template_are_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"template failed: ."):
        render(source, talk("user: a"))


def test_hostile_template_is_the_requests_error() -> None:
    with pytest.raises(InvalidRequest, match="template failed: it makes something too large"):
        render("{{ 'x' * 1000000000000 }}", talk("user: a"))


def test_long_template_for_a_short_message_is_no_attack() -> None:
    assert len(render("{{ 'x' * 500000 }}", talk("user: a"))) == 500_000


def test_generation_tag_and_loop_controls_are_known() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}<{{ m.content }}>{% endgeneration %}{% endfor %}"
    )
    assert render(source, talk("user: a", "user: b")) == "<a>"


class TestLoad:
    """Where the template comes from."""

    def test_override_comes_first_then_the_file_then_the_config(self, write_folder: WriteFolder) -> None:
        folder = write_folder(tokenizer_config={"chat_template": "config"})
        assert self.rendered(folder) == "config"
        (folder / "chat_template.jinja").write_text("file")
        assert self.rendered(folder) == "file"
        assert self.rendered(folder, override="mine") == "mine"

    def test_named_templates(self, write_folder: WriteFolder) -> None:
        named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
        folder = write_folder(tokenizer_config={"chat_template": named})
        assert self.rendered(folder) == "plain"
        assert self.rendered(folder, tools=[{"type": "function"}]) == "tools"

    def test_named_templates_in_files(self, tmp_path: Path) -> None:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "chat_template.jinja").write_text("plain")
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
        assert self.rendered(tmp_path) == "plain"
        assert self.rendered(tmp_path, tools=[{"type": "function"}]) == "tools"

    def test_without_a_template_chat_is_refused(self, tmp_path: Path) -> None:
        template = ChatTemplate.load(tmp_path, special_tokens={})
        assert not template.exists
        with pytest.raises(InvalidRequest, match=r"no chat template.*--chat-template"):
            template.render(talk("user: a"))

    def test_without_a_default_template_plain_chat_is_refused(self, write_folder: WriteFolder) -> None:
        folder = write_folder(tokenizer_config={"chat_template": [{"name": "rag", "template": "x"}]})
        with pytest.raises(InvalidRequest, match="only for rag"):
            self.rendered(folder)

    @pytest.mark.parametrize("source", ["{% if %}", "{{ a | nothing }}", "{% include 'x' %}{% for %}"])
    def test_broken_template_is_found_at_the_start(self, tmp_path: Path, source: str) -> None:
        with pytest.raises(StartupFailed, match=r"line 1|No filter"):
            ChatTemplate.load(tmp_path, special_tokens={}, override=source)

    def test_template_of_another_kind_is_refused(self, write_folder: WriteFolder) -> None:
        with pytest.raises(StartupFailed, match="chat_template is neither"):
            self.rendered(write_folder(tokenizer_config={"chat_template": 5}))

    def rendered(self, folder: Path, *, override: str | None = None, **options: Any) -> str:
        return ChatTemplate.load(folder, special_tokens={}, override=override).render(talk("user: a"), **options)


@pytest.mark.slow
@pytest.mark.parametrize("source", [CHATML, HEADERS, ALTERNATING, NO_SYSTEM, PARTS])
@pytest.mark.parametrize("mode", ["new", "closed", "continued"])
def test_transformers_renders_the_same(source: str, mode: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = talk("user: a", "assistant:  b\n", "user: c 😀", "assistant: so far ")
    options: dict[str, Any] = {"add_generation_prompt": mode == "new", "continue_final_message": mode == "continued"}
    theirs = render_jinja_template([messages], chat_template=source, **TOKENS, **options)[0]
    assert render(source, messages, **options) == theirs[0]
