"""Everything that is written runs: the examples in the docstrings of all modules, and the code in all pages.

A page (``README.md`` and the like) is one session: its ```` ```python ```` blocks are executed in order, and where a
block shows prompts, what they print is compared. Examples are seeded and run in an empty folder, on the instrumented
package.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import pyro
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pyro_genmods"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules() -> list[str]:
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted(PACKAGE.rglob("*.py"))]
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


def written_examples(path: Path) -> int:
    """Number of docstrings with a prompt, read off the source: what doctest must find."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, documented)]
    return sum(">>> " in (ast.get_docstring(node) or "") for node in nodes)


def run(test: doctest.DocTest) -> int:
    """Run one docstring and return its number of failures; doctest prints each with what was expected and got."""
    pyro.set_rng_seed(0)
    return doctest.DocTestRunner(optionflags=FLAGS).run(test).failed


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", modules())
def test_docstrings(name):
    module = importlib.import_module(name)
    found = [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]
    assert len(found) == written_examples(Path(module.__file__)), "doctest misses some of the examples"
    failed = {test.name: run(test) for test in found}
    assert not sum(failed.values()), failed


def test_a_wrong_example_fails(capsys):
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert run(wrong) == 1
    assert "Expected" in capsys.readouterr().out


def session(text: str) -> list[tuple[int, str]]:
    """The code blocks of a page with their line numbers."""
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in BLOCK.finditer(text)]


def run_page(path: Path) -> None:
    pyro.set_rng_seed(0)
    names: dict[str, object] = {"__name__": path.stem}
    for line, block in session(path.read_text()):
        if ">>> " in block:
            test = doctest.DocTestParser().get_doctest(block, names, path.name, str(path), line)
            result = doctest.DocTestRunner(optionflags=FLAGS).run(test, clear_globs=False)
            assert result.failed == 0, f"{path.name}:{line}"
            names = test.globs  # the parser copies them
        else:
            exec(compile("\n" * line + block, str(path), "exec"), names)


@pytest.mark.parametrize("path", [page for page in PAGES if session(page.read_text())], ids=lambda p: p.name)
def test_pages(path):
    run_page(path)


def test_a_wrong_page_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\nthen\n```python\n>>> x + 1\n2\n>>> x + 1\n3\n```\n")
    with pytest.raises(AssertionError, match=r"page.md:5"):
        run_page(page)


def test_a_page_is_one_session(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n```python\n>>> y = x + 1\n```\n```python\nassert y == 2\n```\n")
    run_page(page)


def test_the_pages_with_code_are_found():
    assert {page.name for page in PAGES if session(page.read_text())} >= {"README.md", "CONTRIBUTING.md"}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []
