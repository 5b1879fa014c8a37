"""Every code block of the documentation and every docstring's example runs."""

import doctest
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_layers import MODULES
from typer.testing import CliRunner

from sage_select import SageConfig
from sage_select.app.cli import app
from sage_select.data.records import checked_pair

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = "\n".join(path.read_text() for path in sorted((ROOT / "examples").glob("*.py")))
BLOCK = re.compile(r"^```([\w{}-]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NOT_RUN = (  # installs, runs for minutes, or wants several devices
    "pip install ", "make ", "diff ", "python examples/", "torchrun ", "accelerate ", "srun "
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_code_blocks(page, monkeypatch, tmp_path):
    """The blocks of a page run one after the other, as a reader would type them."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SAGE_SELECT_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {"__name__": page.stem}
    for number, (language, block) in enumerate(BLOCK.findall(page.read_text())):
        text = block.replace("runs/", f"{tmp_path}/")
        match language:
            case "python":
                exec(compile(text, f"{page.name}, block {number}", "exec"), names)
            case "yaml":
                SageConfig(**yaml.safe_load(text))
                if text.startswith("# "):  # the first line names the file it is
                    Path(text[2:].splitlines()[0]).write_text(text)
                else:
                    (tmp_path / "run.yaml").write_text(text)
            case "shell":
                for line in text.replace("\\\n", " ").splitlines():
                    run_in_shell(line, tmp_path)
            case "json":
                checked_pair(json.loads(text))
            case "diff":
                for line in re.findall(r"^\+ *(.+)", text, re.MULTILINE):
                    assert line in EXAMPLES, line
            case "{toctree}" | "{eval-rst}":  # the site's own, see below
                pass
            case _:
                pytest.fail(f"{page.name}: a block of {language or 'no language'} is not tested")


def run_in_shell(line: str, folder: Path) -> None:
    """A command of sage-select, with the variables before it; others are known by their start."""
    if line.startswith(NOT_RUN):
        return
    *variables, arguments = line.partition("sage-select ")[::2]
    environment = dict(pair.split("=") for pair in variables[0].split())
    words = shlex.split(arguments, comments=True)
    words = [str(folder / word) if word == "run.yaml" else word for word in words]
    if "run.yaml" in arguments.split() and "Qwen" in (folder / "run.yaml").read_text():
        words = ["config", "show", str(folder / "run.yaml")]  # its model and data are not here
    result = CliRunner().invoke(app, words, env=environment)
    assert result.exit_code == 0, (line, result.output)


def test_the_readme_shows_code_early_and_stays_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("```python") < 20
    assert len(lines) <= 125
    assert len(re.findall("^```python", (ROOT / "README.md").read_text(), re.MULTILINE)) >= 2


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_what_a_page_names_exists(page):
    named = re.findall(r"`((?:docs|examples|tests)/[\w./]+)`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_docstring_examples(name):
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(module, optionflags=flags).failed == 0


def test_docstring_examples_of_the_task():
    assert doctest.testmod(importlib.import_module("arithmetic")).failed == 0


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-E", "-W", "--keep-going", "-q", "docs", tmp_path]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    for page in PAGES[1:]:
        assert (tmp_path / f"{page.stem}.html").exists()
    concepts = (tmp_path / "concepts.html").read_text()
    assert concepts.count("<math xmlns") > 10  # drawn without a script
    assert "<td><p>Peak of the schedule.</p></td>" in (tmp_path / "configuration.html").read_text()
    outside = re.findall(r'(?:src|href)="(https?://[^"]+)"', concepts)
    assert [url for url in outside if url.endswith((".js", ".css"))] == []


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    listed = set(index.partition("```{toctree}")[2].split())
    assert {page.stem for page in PAGES[1:]} - {"index"} <= listed


def test_every_export_is_in_the_reference():
    import sage_select

    reference = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in sage_select.__all__ if name not in reference] == []
