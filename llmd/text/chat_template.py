"""Messages → prompt text, with the model's own Jinja template. Knows nothing of tokens, HTTP or the API's structs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes

from llmd.errors import InvalidRequest, StartupFailed
from llmd.text.messages import Message, milder_variants, normalized, with_suffix
from llmd.text.template_sandbox import TemplateRefused, TemplateSandbox, size_of

_SECONDS = 1.0
_TIME_LIMIT = 5 * _SECONDS  # of processor time, for one rendering

# A prompt, and each value on the way to it, may have so many characters: more than any honest template makes.
_MAX_OWN_SIZE = 1 << 20
_MAX_GROWTH = 8  # × the size of what it is given

_DEFAULT = "default"
_WITH_TOOLS = "tool_use"

# Stands where the final message ends. The space at its end shows whether the template trims its messages.
_CONTINUE_MARK = "⟦continue here⟧ "

# What `render` passes by itself; a request's chat_template_kwargs may not.
_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


@dataclass(frozen=True, slots=True)
class _Compiled:
    template: Template
    keeps_parts: bool  # it goes through lists of content parts by itself
    knows_developer: bool  # it has a "developer" role


class ChatTemplate:
    """A model's chat templates, compiled once. Safe for several threads.

    A hostile template can take 5 s of processor time at each attempt (see `template_sandbox` for what is guaranteed),
    so a server renders outside its event loop.
    """

    def __init__(self, sources: Mapping[str, str], *, special_tokens: Mapping[str, str]) -> None:
        """`sources`: name ("default", "tool_use") → Jinja source; none at all means that every rendering is refused.
        `special_tokens`: "bos_token" and so on → text. Raises StartupFailed for a source that is no template."""
        sandbox = TemplateSandbox()
        self._sandbox = sandbox
        self._special_tokens = dict(special_tokens)
        self._compiled = {name: _compile(sandbox, source, name=name) for name, source in sources.items()}

    @classmethod
    def load(cls, folder: Path, *, special_tokens: Mapping[str, str], override: str | None = None) -> "ChatTemplate":
        """The operator's template, else the folder's chat_template.jinja, else that of its tokenizer_config.json."""
        sources = {_DEFAULT: override} if override is not None else _read_sources(folder)
        return cls(sources, special_tokens=special_tokens)

    @property
    def exists(self) -> bool:
        """Whether there is a template at all."""
        return bool(self._compiled)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Everything passed in is plain JSON data and is not changed.

        `kwargs`: the request's chat_template_kwargs, variables of the template. A template that refuses the roles is
        given the messages again with neighbours of one role merged, then with system messages as user messages.
        Raises InvalidRequest; for what the template itself says, with its words.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                param="continue_final_message",
            )
        compiled = self._choose(with_tools=bool(tools))
        variables = {
            **self._special_tokens,
            **_checked_kwargs(kwargs or {}),
            "tools": tools or None,
            "documents": documents or None,
            "add_generation_prompt": add_generation_prompt,
        }
        talk = normalized(messages, keeps_parts=compiled.keeps_parts, knows_developer=compiled.knows_developer)
        if not continue_final_message:
            return self._render_accepted(compiled.template, talk, variables)
        return _cut_at_mark(self._render_accepted(compiled.template, with_suffix(talk, _CONTINUE_MARK), variables))

    def _choose(self, *, with_tools: bool) -> _Compiled:
        if not self._compiled:
            raise InvalidRequest(
                "This model has no chat template, so messages cannot be made into a prompt. "
                "Start the server with --chat-template, or use /v1/completions."
            )
        if with_tools and _WITH_TOOLS in self._compiled:
            return self._compiled[_WITH_TOOLS]
        if _DEFAULT not in self._compiled:
            raise InvalidRequest(
                f"This model has chat templates only for {', '.join(sorted(self._compiled))}, none for plain chat. "
                "Start the server with --chat-template."
            )
        return self._compiled[_DEFAULT]

    def _render_accepted(self, template: Template, messages: list[Message], variables: dict[str, Any]) -> str:
        """The messages as they are, or else the first milder variant of them that the template accepts."""
        try:
            return self._render_once(template, messages, variables)
        except TemplateRefused as error:
            refusal = error
        for variant in milder_variants(messages):
            try:
                return self._render_once(template, variant, variables)
            except TemplateRefused:
                continue
        raise InvalidRequest(f"The model's chat template refuses these messages: {refusal}", param="messages")

    def _render_once(self, template: Template, messages: list[Message], variables: dict[str, Any]) -> str:
        given = {**variables, "messages": messages}
        max_size = _MAX_OWN_SIZE + _MAX_GROWTH * size_of(given)
        try:
            return self._sandbox.render(template, given, time_limit=_TIME_LIMIT, max_size=max_size)
        except TemplateRefused:
            raise
        except Exception as error:
            # A template is a program: its mistakes, and messages that it does not expect, surface as any error.
            reason = str(error) or type(error).__name__
            raise InvalidRequest(f"The model's chat template failed: {reason}", param="messages") from error


def _read_sources(folder: Path) -> dict[str, str]:
    """The folder's templates by name; none if it has none."""
    files = {_DEFAULT: folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if files[_DEFAULT].is_file():
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    path = folder / "tokenizer_config.json"
    try:
        source = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise StartupFailed(f"{path} cannot be read: {error}") from error
    match source:
        case None:
            return {}
        case str():
            return {_DEFAULT: source}
        case [*named] if all(isinstance(one, dict) and {"name", "template"} <= one.keys() for one in named):
            return {one["name"]: one["template"] for one in named}
    raise StartupFailed(f"{path}: chat_template is neither a text nor a list of named templates")


def _compile(sandbox: TemplateSandbox, source: str, *, name: str) -> _Compiled:
    try:
        template = sandbox.compile_template(source)
        keeps_parts = _goes_through_parts(sandbox.parse(source))
    except TemplateSyntaxError as error:
        raise StartupFailed(f"The chat template ({name}) is not valid Jinja, line {error.lineno}: {error}") from error
    except (TemplateError, RecursionError, SyntaxError) as error:
        raise StartupFailed(f"The chat template ({name}) cannot be compiled: {error}") from error
    return _Compiled(template, keeps_parts, knows_developer="developer" in source)


def _goes_through_parts(tree: nodes.Template) -> bool:
    """Whether some loop runs over a message's content: such a template takes lists of content parts."""
    aliases = {"content"}
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node):
            aliases.add(assignment.target.name)
    loops = [_unfiltered(loop.iter) for loop in tree.find_all(nodes.For)]
    return any(_is_content(items) or (isinstance(items, nodes.Name) and items.name in aliases) for items in loops)


def _is_content(expression: nodes.Node) -> bool:
    """`message.content` or `message["content"]`, of whatever message."""
    match expression:
        case nodes.Getattr(attr="content"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
    return False


def _unfiltered(expression: nodes.Node) -> nodes.Node:
    while isinstance(expression, nodes.Filter) and expression.node is not None:
        expression = expression.node
    return expression


def _checked_kwargs(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in kwargs:
        if name in _OWN_VARIABLES:
            raise InvalidRequest(
                f"chat_template_kwargs cannot set {name!r}: the request has a field for it.",
                param=f"chat_template_kwargs.{name}",
            )
    return kwargs


def _cut_at_mark(prompt: str) -> str:
    """The prompt up to where the final message ends, trimmed there if the template trims its messages."""
    mark = _CONTINUE_MARK.strip()
    end = prompt.rfind(mark)
    if end < 0:
        raise InvalidRequest(
            "continue_final_message is set, but the chat template does not show the final message's text.",
            param="continue_final_message",
        )
    is_trimmed = not prompt.startswith(_CONTINUE_MARK, end)
    return prompt[:end].rstrip() if is_trimmed else prompt[:end]
