"""The jinja2 environment in which chat templates run: no way out, and limits on time and size (contract C8).

Must not know what a chat is. What is guaranteed:

- jinja2's immutable sandbox: no access to Python's internals, no change to the values passed in, no file or loader.
- Every loop turn, call, filter, operator and piece of output checks the processor time of the rendering thread, so
  no loop or recursion outlasts the deadline, however long it would be. Waiting for a busy machine does not count.
- Every text, list or number that an operator, literal, call or filter makes, and the output, is at most `max_size`
  (characters and items, nested ones included), so nothing can be doubled for ever.

What is not: a single built-in operation runs to its end before it is checked, and a hostile template can make one
that is large (a long list joined by a long separator). Templates from strangers stay off unless the operator allows
them.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from math import inf
from typing import Any, cast

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_MAX_NUMBER_BITS = 4096

# A width, precision or nested width with which formatting alone could fill the memory.
_WIDE_FORMAT = re.compile(r"\d{5}|%[-+ #0]*\*|\{[^{}]+\{")

# Names of filters that only the transformed template can use: no identifier has a space.
_TURNS = "loop turns"
_JOINED = "joined text"
_MADE = "made here"


class TemplateRefused(TemplateError):
    """The template called raise_exception: it does not accept these messages."""


class TemplateLimitExceeded(TemplateError):
    """The template took too long or made something too large."""


class _Budget(threading.local):
    """What the rendering that runs in this thread may still use."""

    deadline = inf  # on this thread's processor clock, seconds
    max_size = 1 << 20


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Compiles chat templates as transformers does, and renders them within limits. Safe for several threads."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        # Constant folding would run the template's operations at compile time, outside the limits.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        self._budget = _Budget()
        self.filters["tojson"] = _tojson
        # They make long texts by themselves, or take long for short ones.
        for name in ("urlize", "pprint"):
            del self.filters[name]
        self.filters = {name: self._limited_filter(function) for name, function in self.filters.items()}
        self.filters |= {_TURNS: self._turns, _JOINED: self._joined, _MADE: self._bounded}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _TemplateNamespace,
        }

    def compile_template(self, source: str) -> Template:
        """Raises jinja2.TemplateError (TemplateSyntaxError has the line) if the source is no template."""
        tree = _LimitedTree().visit(self.parse(source))
        tree.set_environment(self)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def render(self, template: Template, variables: dict[str, Any], *, time_limit: float, max_size: int) -> str:
        """`time_limit` in seconds of this thread's processor time; `max_size` in characters and items.

        Raises whatever the template raises: TemplateRefused, TemplateLimitExceeded, other TemplateErrors, and Python's
        own errors from operations that do not fit their operands.
        """
        self._budget.max_size = max_size
        self._budget.deadline = time.thread_time() + time_limit
        return template.render(variables)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """jinja2 calls this for every call in a template."""
        __self._check_time()
        __self._check_counts((*args, *kwargs.values()))
        return __self._bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """jinja2 calls this for every arithmetic operator in a template."""
        self._check_time()
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator in ("*", "**"):
            self._check_product(operator, left, right)
        return self._bounded(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """jinja2 calls this for every attribute that is read: str.format gets its own check."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def _check_time(self) -> None:
        if time.thread_time() > self._budget.deadline:
            raise TemplateLimitExceeded("it takes too long (a loop without end?)")

    def _check_counts(self, arguments: Iterable[Any]) -> None:
        """No function gets a number that, as a width or count, would make more than fits."""
        if any(isinstance(value, int) and value > self._budget.max_size for value in arguments):
            raise TemplateLimitExceeded("it passes a number that is too large")

    def _check_product(self, operator: str, left: Any, right: Any) -> None:
        """Refuses repetitions and powers that are too large before they are made."""
        if isinstance(left, int) and isinstance(right, int):
            num_bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            too_large = num_bits > _MAX_NUMBER_BITS
        elif isinstance(left, int):
            too_large = left * _size(right, self._budget.max_size) > self._budget.max_size
        else:
            too_large = isinstance(right, int) and right * _size(left, self._budget.max_size) > self._budget.max_size
        if too_large:
            raise TemplateLimitExceeded("it makes something too large")

    def _bounded(self, value: Any) -> Any:
        """The value itself, if it is not too large."""
        if _size(value, self._budget.max_size) > self._budget.max_size:
            raise TemplateLimitExceeded("it makes something too large")
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        """jinja2 puts together with this what a template, macro or block has written."""
        written: list[str] = []
        size = 0
        for piece in pieces:
            self._check_time()
            size += len(piece)
            if size > self._budget.max_size:
                raise TemplateLimitExceeded("it writes too much")
            written.append(piece)
        return "".join(written)

    def _joined(self, values: list[Any]) -> str:
        return self.concat(map(str, values))

    def _turns(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._check_time()
            yield value

    def _limited_filter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # What is filtered comes first, or behind the context that some filters ask for; it may be any number.
        num_leading = 2 if hasattr(function, "jinja_pass_arg") else 1

        @wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self._check_time()
            self._check_counts((*args[num_leading:], *kwargs.values()))
            if function.__name__ == "do_format":
                _check_format(str(args[0]))
            return self._bounded(function(*args, **kwargs))

        return limited


class _LimitedTree(NodeTransformer):
    """Passes through the sandbox's checks what jinja2 compiles to bare Python: loops, `~` and literals."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(cast(nodes.Expr, node.iter), _TURNS)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _MADE)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _MADE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _MADE) if node.ctx == "load" else node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _GenerationTag(Extension):
    """{% generation %} marks the assistant's text for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it from the class)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _TemplateNamespace(Namespace):
    """`namespace()` without a way to set what Python itself reads, and whose contents do not print."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_attribute_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have an attribute {name!r}")


def _check_format(pattern: str) -> None:
    if _WIDE_FORMAT.search(pattern):
        raise TemplateLimitExceeded("it formats with a width that is too large, or not fixed")


def _raise_exception(message: object) -> None:
    raise TemplateRefused(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it; jinja2's own would escape HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def size_of(value: Any) -> int:
    """Characters and items of a value, nested ones included."""
    return _size(value, None)


def _size(value: Any, limit: int | None) -> int:
    """The same; counting stops somewhere above `limit`, so that values with shared parts cost no more than that."""
    if isinstance(value, str):
        return len(value)
    size = 0
    remaining = [value]
    while remaining and (limit is None or size <= limit):
        item = remaining.pop()
        size += 1
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, Mapping):
            remaining += item.keys()
            remaining += item.values()
        elif isinstance(item, Collection) and not isinstance(item, range):
            remaining += item
        elif isinstance(item, int):
            size += item.bit_length() // 3
    return size
