"""Imports go strictly downward, and the library drags in no host framework."""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# A folder may import from itself and the folders named, and of other packages only those named.
METHOD = "the method"  # the modules at the top of the package
FOLDERS: dict[str, tuple[set[str], set[str]]] = {
    METHOD: (set(), {"numpy", "torch"}),
    "system": ({METHOD}, {"numpy", "pydantic", "torch", "tqdm"}),
    "ops": ({"system"}, {"torch", "triton"}),
    "data": ({METHOD, "system"}, {"datasets", "jinja2", "numpy", "polars", "pyarrow"}),
    "models": ({METHOD, "system", "ops", "data"}, {"httpx", "numpy", "torch", "transformers"}),
    "references": (
        {METHOD, "system", "ops", "data", "models"},
        {"numpy", "polars", "pyarrow", "torch"},
    ),
    "selecting": ({METHOD, "system", "data", "models"}, {"numpy", "polars", "torch"}),
    "training": (
        {METHOD, "system", "data", "models", "selecting"},
        {"numpy", "pydantic", "torch", "transformers"},
    ),
    "app": (
        {METHOD, "system", "data", "models", "references", "selecting", "training"},
        {"numpy", "polars", "pydantic", "rich", "torch", "transformers", "typer", "yaml"},
    ),
    "adapters": (
        {METHOD, "system", "data", "models", "references", "selecting", "training", "app"},
        {"lightning", "numpy", "torch", "transformers", "trl"},
    ),
}
HOSTS = {"accelerate", "datasets", "lightning", "peft", "trl", "matplotlib", "pandas"}


def module_files() -> dict[str, Path]:
    """Every module of the library by its dotted name, adapters included."""
    files = {}
    for folder, package in (("sage_select", "sage_select"), ("adapters", "sage_select.adapters")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return files


MODULES = {name: path for name, path in module_files().items() if name != "sage_select"}


def folder_of(module: str) -> str:
    """The folder that a module of the library belongs to."""
    first = module.split(".")[1]
    return first if first in FOLDERS else METHOD


def imports(module: str, source: str) -> list[str]:
    """The modules that a source imports, by their full names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            home = "." * node.level + (node.module or "")
            if node.level:
                home = ".".join([*module.split(".")[: -node.level], node.module or ""])
            # `from package import module` imports the module
            inner = [f"{home}.{a.name}" for a in node.names if f"{home}.{a.name}" in MODULES]
            found += inner if len(inner) == len(node.names) else [home]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def violations(module: str, source: str) -> list[str]:
    """What a module must not import, and does."""
    folder = folder_of(module)
    below, packages = FOLDERS[folder]
    found = []
    for target in imports(module, source):
        top = target.split(".")[0]
        if top == "sage_select":
            allowed = target in MODULES and folder_of(target) in {folder, *below}
        else:
            allowed = top in sys.stdlib_module_names or top in packages
        if not allowed:
            found.append(f"{module} (in {folder}) imports {target}")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_downward(module):
    assert violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("sage_select.losses", "from sage_select.selecting.selector import Selector"),
        ("sage_select.losses", "from sage_select import app"),
        ("sage_select.losses", "import polars"),
        ("sage_select.training.loop", "from sage_select.adapters.plain import shard"),
        ("sage_select.app.jobs", "from sage_select.adapters import plain"),
        ("sage_select.data.dataset", "import transformers.models"),
    ],
)
def test_the_test_above_can_fail(module, line):
    assert violations(module, line)


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: imports(name, path.read_text()) for name, path in MODULES.items()}
    ours = {name: [n for n in names if n in MODULES and n != name] for name, names in graph.items()}
    assert len(list(TopologicalSorter(ours).static_order())) == len(MODULES)  # raises at a circle


def imported_by(statement: str, names: set[str]) -> set[str]:
    """Which of these packages a fresh interpreter has loaded after the statement."""
    code = f"{statement}\nimport sys\nprint(*({names!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


LOADS_MODELS = {"jobs", "train", "build_loader"}  # by way of transformers


def test_no_host_framework_is_imported():
    import sage_select

    names = ", ".join(sorted(set(sage_select.__all__) - LOADS_MODELS))
    assert imported_by(f"from sage_select import {names}", HOSTS | {"transformers"}) == set()
    names = ", ".join(sorted(LOADS_MODELS))
    loaded = imported_by(f"from sage_select import {names}", HOSTS)
    assert loaded <= imported_by("from transformers import AutoModelForCausalLM", HOSTS)


def test_the_test_above_can_fail_too():
    assert imported_by("from sage_select import sage", {"torch"}) == {"torch"}


def test_the_package_and_the_command_line_start_without_torch():
    heavy = {"torch", "transformers", "numpy", "polars", "pydantic"}
    assert imported_by("import sage_select, sage_select.app.cli", heavy) == set()


def test_every_folder_is_installed():
    """An editable install finds a folder that a wheel would lack."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {
        ".".join(path.relative_to(ROOT).parts[:-1])
        for path in (ROOT / "sage_select").rglob("__init__.py")
    }
    packages = project["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted(folders | {"sage_select.adapters"})


def test_every_module_imports():
    imported_by("\n".join(f"import {module}" for module in MODULES), set())


def test_exports_are_the_same_for_python_and_for_a_type_checker():
    import sage_select

    tree = ast.parse(module_files()["sage_select"].read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed.pop("jobs") == "sage_select.app"
    assert typed == {name: f"sage_select.{home}" for name, home in sage_select._HOMES.items()}
    assert len(sage_select.__all__) <= 40
    with pytest.raises(AttributeError, match="has no attribute 'sagee'"):
        sage_select.sagee  # noqa: B018
