"""Hostile templates: no way out of the sandbox, no loop without end, nothing too large."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from llmd.text.template_sandbox import TemplateLimitExceeded, TemplateSandbox, size_of

VALUES = {"words": ["a", "b", "c"], "facts": {"k": [1, 2]}, "text": "some text", "big_number": 10**12}


def render(source: str, *, time_limit: float = 0.2, max_size: int = 10_000) -> str:
    sandbox = TemplateSandbox()
    return sandbox.render(sandbox.compile_template(source), VALUES, time_limit=time_limit, max_size=max_size)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}{{ words.__init__.__globals__ }}",
        "{{ ''|attr('__class__') }}{{ ''|attr('__class__')|attr('__base__') }}",
        "{{ '{0.__class__}'.format(text) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['sys'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ words.append('d') }}",
        "{{ facts.update(x=1) }}",
        "{{ facts.pop('k') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_there_is_no_way_out(source: str) -> None:
    try:
        text = render(source)
    except (TemplateError, TypeError):
        text = ""
    assert not any(sign in text for sign in ("class", "module", "builtin", "root:", "uid=", "function"))
    assert VALUES["words"] == ["a", "b", "c"]
    assert VALUES["facts"] == {"k": [1, 2]}


@pytest.mark.parametrize(
    "source", ["{% set n = namespace(__class__=1) %}", "{% set n = namespace() %}{% set n.__class__ = text %}"]
)
def test_namespaces_have_no_hidden_attributes(source: str) -> None:
    with pytest.raises(SecurityError, match="__class__"):
        render(source)


LOOPS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "nested loops without calls": "{% set r = range(99999) %}"
    "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "branching macros without output": "{% macro f(n) %}{% if n %}{% set x = f(n[1:]) %}{% set y = f(n[1:]) %}"
    "{% endif %}{% endmacro %}{{ f(range(100) | list) }}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if b > a + 99999 %}{% endfor %}{% endfor %}",
    "branching macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "macros of loops": "{% macro f(n) %}{% for i in range(9999) %}{{ f(n) if n > 100 }}{% endfor %}{% endmacro %}"
    "{% for i in range(99999) %}{{ f(1) }}{% endfor %}",
    "recursive loop": "{% for a in words recursive %}{{ loop(words) if loop.depth < 99 }}{% endfor %}",
    "calls": "{% for a in range(99999) %}{{ range(99999) | list | length if a < 0 }}"
    "{% for b in range(99999) %}{{ b.bit_length() and '' }}{% endfor %}{% endfor %}",
    "filters": "{% for a in range(99999) %}{% set x = range(9999) | map('string') | list %}{% endfor %}",
}


@pytest.mark.parametrize("name", LOOPS)
def test_loop_without_end_is_stopped(name: str) -> None:
    with pytest.raises(TemplateLimitExceeded, match="too long"):
        render(LOOPS[name], max_size=1 << 20)


GROWTHS = {
    "output": "{% for a in range(99999) %}{{ text }}{% endfor %}",
    "repeated text": "{{ 'x' * 1000000000000 }}",
    "repeated text, turned round": "{{ 1000000000000 * 'x' }}",
    "repeated list": "{{ [1] * 1000000000000 }}",
    "power": "{{ 10 ** 10000000000 }}",
    "squares": "{% set n = namespace(x=99999999) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "sums": "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "joins": "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "nested lists": "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}",
    "nested tuples": "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = (n.x, n.x) %}{% endfor %}",
    "nested dicts": "{% set n = namespace(x={}) %}{% for i in range(99) %}{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}"
    "{{ n.x | tojson }}",
    "nested views": "{% set n = namespace(x={}) %}{% for i in range(99) %}{% set n.x = dict(a=n.x, b=n.x.items()) %}"
    "{% endfor %}{{ n.x }}",
    "captured blocks": "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set x %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = x %}{% endfor %}",
    "width of a method": "{{ 'x'.ljust(1000000000000) }}",
    "width of a filter": "{{ 'x' | center(1000000000000) }}",
    "width by name": "{{ 'x' | indent(width=1000000000000, first=true) }}",
    "width of %": "{{ '%1000000000000d' % 1 }}",
    "width of % from outside": "{{ '%*d' % (big_number, 1) }}",
    "width of the format filter": "{{ '%1000000000000d' | format(1) }}",
    "width of str.format": "{{ '{:1000000000000}'.format(1) }}",
    "width of str.format from outside": "{{ '{:{w[0]}}'.format(1, w=[big_number]) }}",
    "large list": "{{ range(99999) | list | length }}",
    "JSON indent": "{{ facts | tojson(indent=1000000000000) }}",
}


@pytest.mark.parametrize("name", GROWTHS)
def test_nothing_grows_too_large(name: str) -> None:
    with pytest.raises(TemplateLimitExceeded, match=r"too large|too much"):
        render(GROWTHS[name], time_limit=10)


def test_stopped_rendering_leaves_the_next_one_alone() -> None:
    sandbox = TemplateSandbox()
    endless = sandbox.compile_template(LOOPS["nested loops"])
    honest = sandbox.compile_template("{{ words | join(' ') }}")
    for _ in range(2):
        with pytest.raises(TemplateLimitExceeded):
            sandbox.render(endless, VALUES, time_limit=0.05, max_size=1000)
        assert sandbox.render(honest, VALUES, time_limit=10, max_size=1000) == "a b c"


HONEST = {
    "{{ 'x' * 3 ~ 4 }}": "xxx4",
    "{{ big_number }} {{ big_number | string }} {{ facts | tojson }}": '1000000000000 1000000000000 {"k": [1, 2]}',
    "{{ '%5.1f|%-3s|100%%' % (2.25, 'a') }}": "  2.2|a  |100%",
    "{{ '{} {{}} {:>4}'.format(1, 2) }}": "1 {}    2",
    "{% for w in words %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}": "1/3,2/3,3/3",
    "{% for k, v in facts.items() %}{{ k }}{{ v[0] }}{% else %}none{% endfor %}": "k1",
    "{% for w in missing %}x{% else %}none{% endfor %}": "none",
    "{% for w in words if w != 'b' %}{{ loop.previtem }}{{ w }}{% endfor %}": "aac",
    "{% set n = namespace(x=[]) %}{% for w in words %}{% set n.x = n.x + [w] %}{% endfor %}{{ n.x | join }}": "abc",
    "{% for w in words | select('ne', 'b') | map('upper') %}{{ w }}{% endfor %}": "AC",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{% call f(1) %}!{% endcall %}": "12!",
    "{% if 'b' in words and facts is mapping %}{{ words[1:] | last }}{% endif %}": "c",
    "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 8 }}{{ (1, 2)[0] }}{{ [1, 2] | sum }}{{ {'a': 1}.a }}": "332561" + "31",
    "{{ ['x', 'y'] | first }}{{ text.split(' ') | length }}{{ text | replace('e', 'E') | title }}": "x2Some Text",
    "{{ strftime_now('%Y') | length }}": "4",
}


@pytest.mark.parametrize("source", HONEST)
def test_honest_templates_do_not_notice_the_limits(source: str) -> None:
    assert render(source, time_limit=10) == HONEST[source]


def test_loop_over_what_is_no_list_is_an_error() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        render("{% for a in 5 %}{% endfor %}")


@given(st.recursive(st.text(max_size=5) | st.booleans(), lambda inner: st.lists(inner, max_size=4), max_leaves=20))
def test_size_counts_every_character_and_item(value: object) -> None:
    def expected(item: object) -> int:
        if isinstance(item, list):
            return 1 + sum(expected(each) for each in item)
        return 1 + (len(item) if isinstance(item, str) else 0)

    assert size_of(value) == (len(value) if isinstance(value, str) else expected(value))
