"""Every code block of the documentation and every docstring's example runs."""

import doctest
import importlib
import re

import pytest
from conftest import ROOT
from test_layers import LEVELS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_code_blocks(page, monkeypatch, tmp_path):
    """The blocks of a page run one after the other, as a reader would type them."""
    monkeypatch.chdir(ROOT)
    blocks = BLOCK.findall(page.read_text())
    names: dict[str, object] = {"__name__": page.stem, "tmp": tmp_path}
    for number, block in enumerate(blocks):
        code = compile(
            block.replace("runs/", f"{tmp_path}/"), f"{page.name}, block {number}", "exec"
        )
        exec(code, names)


def test_the_readme_shows_code_early_and_stays_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("```python") < 20
    assert len(lines) <= 125
    assert len(BLOCK.findall((ROOT / "README.md").read_text())) >= 2


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_what_a_page_names_exists(page):
    named = re.findall(r"`((?:docs|examples|tests)/[\w./]+)`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", [name for name in LEVELS if name != "adapters"])
def test_docstring_examples(name):
    module = importlib.import_module(f"sage_select.{name}")
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(module, optionflags=flags).failed == 0


def test_docstring_examples_of_the_task():
    assert doctest.testmod(importlib.import_module("arithmetic")).failed == 0
