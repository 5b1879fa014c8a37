"""Imports go strictly downward, and the library drags in no host framework."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# A module may import modules of lower levels only, and of other packages only those named.
PURE = {"numpy", "torch"}
LEVELS: dict[str, tuple[int, set[str]]] = {
    "hashing": (0, {"numpy"}),
    "cache": (0, set()),
    "progress": (0, {"tqdm"}),
    "records": (0, set()),
    "fingerprints": (0, {"torch"}),
    "sources": (1, {"datasets", "numpy", "polars", "pyarrow"}),
    "tokenising": (2, {"jinja2", "polars", "pyarrow"}),
    "quotas": (1, {"numpy"}),
    "rows": (1, {"numpy"}),
    "schedules": (0, set()),
    "ops.reference": (0, {"torch"}),
    "ops.products": (0, {"torch"}),
    "processes": (0, {"torch"}),
    "wrappers": (0, {"torch"}),
    "liveness": (1, {"torch"}),
    "ops.shards": (1, {"torch"}),
    "ops.kernels": (0, {"triton"}),
    "ops.tilings": (1, {"torch", "triton"}),
    "ops.logits": (1, {"torch"}),
    "ops.chunked": (2, {"torch"}),
    "ops.fused": (2, {"torch", "triton"}),
    "ops.tuning": (3, {"torch", "triton"}),
    "ops.operators": (3, {"torch"}),
    "ops.token_logps": (4, {"torch"}),
    "ops": (5, set()),
    "pairs": (2, PURE),
    "plan": (3, {"numpy"}),
    "scores": (3, PURE),
    "losses": (3, {"torch"}),
    "metrics": (3, {"torch"}),
    "ranking": (3, {"numpy"}),
    "audit": (3, {"numpy", "polars"}),
    "dataset": (3, {"numpy", "polars", "pyarrow"}),
    "heads": (0, {"torch"}),
    "costs": (1, PURE),
    "packing": (4, PURE | {"transformers"}),
    "sequences": (4, {"numpy"}),
    "forward": (5, PURE),
    "trials": (6, PURE),
    "measuring": (7, PURE),
    "store": (8, {"numpy", "polars", "pyarrow", "torch"}),
    "serving": (8, PURE | {"httpx"}),
    "selector": (8, PURE),
    "checkpoints": (8, {"torch"}),
    "loader": (9, {"numpy"}),
    "config": (4, {"pydantic", "yaml"}),
    "exports": (9, {"numpy", "polars"}),
    "adapters": (10, set()),
    "adapters.plain": (11, {"torch", "transformers"}),
    "adapters.lightning": (12, {"lightning", "torch", "transformers"}),
    "adapters.trl_support": (12, {"torch", "trl"}),
    "adapters.trl": (13, {"numpy", "torch", "transformers"}),
    "runs": (12, {"numpy", "torch", "transformers"}),
    "forecast": (13, {"numpy", "torch", "transformers"}),
    "doctor": (14, PURE),
    "cli": (15, {"numpy", "polars", "rich", "torch", "transformers", "typer"}),
}
HOSTS = {"accelerate", "datasets", "lightning", "peft", "trl", "matplotlib", "pandas"}


def module_files() -> dict[str, Path]:
    files = {}
    for folder, prefix in ((ROOT / "sage_select", ""), (ROOT / "adapters", "adapters.")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = prefix + ".".join(part for part in parts if part != "__init__")
            if name:
                files[name.rstrip(".")] = path
    return files


def violations(name: str, source: str) -> list[str]:
    """What a module of this name must not import, and does."""
    level, packages = LEVELS[name]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        elif isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        else:
            continue
        for target in imported:
            top = target.split(".")[0]
            if top == "sage_select":
                inner = target.removeprefix("sage_select.")
                if inner not in LEVELS or LEVELS[inner][0] >= level:
                    found.append(f"{name} (level {level}) imports {target}")
            elif top not in sys.stdlib_module_names and top not in packages:
                found.append(f"{name} imports {target}")
    return found


@pytest.mark.parametrize("name", sorted(module_files()))
def test_imports_go_downward(name):
    assert violations(name, module_files()[name].read_text()) == []


def test_every_level_is_a_module():
    assert set(LEVELS) == set(module_files())


@pytest.mark.parametrize(
    "line",
    ["from sage_select.selecting.selector import Selector", "from sage_select.scores import sage",
     "import polars", "import transformers.models"],
)  # fmt: skip
def test_the_test_above_can_fail(line):
    assert violations("losses", line)


def imported_by(statement: str, names: set[str]) -> set[str]:
    """Which of these packages a fresh interpreter has loaded after the statement."""
    code = f"{statement}\nimport sys\nprint(*({names!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_no_host_framework_is_imported():
    assert imported_by("import sage_select", HOSTS | {"transformers"}) == set()


def test_the_test_above_can_fail_too():
    assert imported_by("import sage_select", {"torch"}) == {"torch"}


def test_every_module_imports():
    modules = [f"sage_select.{name}" for name in LEVELS]
    imported_by("\n".join(f"import {module}" for module in modules), set())


def test_few_exports():
    import sage_select

    names = [name for name in vars(sage_select) if not name.startswith("_")]
    exported = [name for name in names if f"sage_select.{name}" not in sys.modules]
    assert len(exported) <= 20
