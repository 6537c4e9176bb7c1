"""What the documents point to exists: the tests that hold a promise, and files."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

RELIABILITY = ROOT / "docs" / "reliability.md"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
TEST = re.compile(r"\[`(\w+)`\]\((\S+\.py)\)")


def test_every_test_that_holds_a_promise_exists() -> None:
    named = TEST.findall(RELIABILITY.read_text())
    assert len(named) > 10
    for name, path in named:
        module = ast.parse((RELIABILITY.parent / path).read_text())
        functions = {node.name for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in functions, f"{path} has no {name}"
        assert name.startswith("test_")


def test_every_promise_has_a_test() -> None:
    rows = [line for line in RELIABILITY.read_text().splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith("| Promise |")]
    assert promises
    for row in promises:
        assert TEST.search(row), row


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_the_layout_names_every_module_of_the_server() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("Inside `server/`") :]
    modules = {path.stem for path in (ROOT / "llmd" / "server").glob("*.py")} - {"__init__", "__main__"}
    named = re.findall(r"`(\w+)`", table.partition("\n\n")[2])
    assert sorted(named) == sorted(modules)


def test_the_layout_names_everything_at_the_top() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = text[text.index("llmd/\n") :].partition("```")[0]
    for path in (ROOT / "llmd").iterdir():
        if not path.name.startswith("_") and path.suffix in ("", ".py"):
            assert re.search(rf"^  {re.escape(path.name)}\b", tree, re.MULTILINE), path.name
