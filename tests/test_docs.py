"""Run every code block of the documentation and every example in a docstring."""

import doctest
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_layers import MODULES
from typer.testing import CliRunner

from sage_select import SageConfig
from sage_select.app.cli import app
from sage_select.data.records import checked_pair

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = "\n".join(path.read_text() for path in sorted((ROOT / "examples").glob("*.py")))
BLOCK = re.compile(r"^```([\w{}-]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NOT_RUN = (  # these install packages, run for minutes, or need several devices
    "pip install ", "make ", "diff ", "python examples/", "torchrun ", "accelerate ", "srun "
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_code_blocks(page, monkeypatch, tmp_path):
    """Run the blocks of a page in order and in one namespace, as a reader would."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SAGE_SELECT_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {"__name__": page.stem}
    for number, (language, block) in enumerate(BLOCK.findall(page.read_text())):
        text = block.replace("runs/", f"{tmp_path}/")
        match language:
            case "python":
                exec(compile(text, f"{page.name}, block {number}", "exec"), names)
            case "yaml":
                (tmp_path / "block.yaml").write_text(text)
                SageConfig.read(tmp_path / "block.yaml")
                if text.startswith("# "):  # the first line is a comment with the file name
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
            case "{toctree}" | "{eval-rst}":  # tested by building the site, see below
                pass
            case _:
                pytest.fail(f"{page.name}: a block of {language or 'no language'} is not tested")


def run_in_shell(line: str, folder: Path) -> None:
    """Run a sage-select command with the variables in front of it; skip those of NOT_RUN."""
    if line.startswith(NOT_RUN):
        return
    *variables, arguments = line.partition("sage-select ")[::2]
    environment = dict(pair.split("=") for pair in variables[0].split())
    words = shlex.split(arguments, comments=True)
    words = [str(folder / word) if word == "run.yaml" else word for word in words]
    if "run.yaml" in arguments.split() and "Qwen" in (folder / "run.yaml").read_text():
        # the model and data of this run are not available; check only the configuration
        words = ["config", "show", str(folder / "run.yaml")]
    result = CliRunner().invoke(app, words, env=environment)
    assert result.exit_code == 0, (line, result.output)


def test_the_readme_shows_code_early_and_stays_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("```python") < 20
    assert len(lines) <= 125
    assert len(re.findall("^```python", (ROOT / "README.md").read_text(), re.MULTILINE)) >= 2


TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", TEXTS, ids=[page.name for page in TEXTS])
def test_paths_on_a_page_exist(page):
    folders = "docs|examples|tests|adapters|sage_select"
    paths = re.findall(rf"`((?:{folders})/[\w./]+)`", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_docstring_examples(name):
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(module, optionflags=flags).failed == 0


def test_docstring_examples_of_the_arithmetic_task():
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
    assert concepts.count("<math xmlns") > 10  # MathML needs no script
    assert "<td><p>Peak of the schedule.</p></td>" in (tmp_path / "configuration.html").read_text()
    external = re.findall(r'(?:src|href)="(https?://[^"]+)"', concepts)
    assert [url for url in external if url.endswith((".js", ".css"))] == []


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    listed = set(index.partition("```{toctree}")[2].split())
    assert {page.stem for page in PAGES[1:]} - {"index"} <= listed


def test_every_export_score_and_loss_is_in_the_reference():
    import sage_select
    from sage_select.losses import LOSSES
    from sage_select.scores import SCORES

    reference = (ROOT / "docs" / "api.md").read_text()
    directives = re.findall(r"^\.\. auto\w+:: ([\w.]+)", reference, re.MULTILINE)
    members = ", ".join(re.findall(r":members: (.+)", reference)).split(", ")
    documented = {name.rpartition(".")[2] for name in [*directives, *members]}
    assert {*sage_select.__all__, *SCORES, *LOSSES} - documented == set()
