"""Figures of the code's shape, to compare two checkouts: `python .ci/figures.py [CHECKOUT ...]`."""

import ast
import re
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

OPENINGS = re.compile(r"(What|Where|Whether|How|Which|Those|These|Why)\b")


def figures(root: Path) -> dict[str, object]:
    """Named figures of the library and its adapters in one checkout."""
    files = sorted([*(root / "sage_select").rglob("*.py"), *(root / "adapters").rglob("*.py")])
    trees = {path: ast.parse(path.read_text()) for path in files}
    functions = [n for tree in trees.values() for n in ast.walk(tree) if _is_function(n)]
    lines = [len(path.read_text().splitlines()) for path in files]
    code = sum(1 for path in files for x in path.read_text().splitlines() if x.strip())
    arrows = _arrows(root, trees)
    texts = {path: path.read_text() for path in files}
    with_precision = [path for path in files if "mixed_precision" in texts[path]]
    return {
        "files": len(files),
        "files at the package's top": len(list((root / "sage_select").glob("*.py"))),
        "file lines, median / p90 / max": _spread(lines),
        "body lines, median / p90 / max": _spread(map(_body, functions)),
        "rooms (folders, and modules at the top)": len({r for arrow in arrows for r in arrow}),
        "arrows between rooms": len(arrows),
        "rooms in circles": len(_in_circles(arrows)),
        "signatures with more than 6 parameters": sum(_parameters(f) > 6 for f in functions),
        "files with mixed_precision": len(with_precision),
        "occurrences of mixed_precision": sum(t.count("mixed_precision") for t in texts.values()),
        "comments per 100 lines": round(100 * sum(map(_comments, files)) / code, 1),
        "docstrings that begin with What, Where, Whether": sum(
            bool(OPENINGS.match(text)) for tree in trees.values() for text in _docstrings(tree)
        ),
        "docstrings": sum(len(_docstrings(tree)) for tree in trees.values()),
        "top-level names defined more than once": len(_repeated(trees.values())),
        **{f"lines of adapters/{p.name}": len(texts[p].splitlines()) for p in files
           if p.parent.name == "adapters"},
    }  # fmt: skip


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _spread(values: Iterable[int]) -> str:
    ordered = sorted(values)
    tenth = ordered[min(len(ordered) - 1, round(0.9 * len(ordered)))]
    return f"{statistics.median(ordered):g} / {tenth} / {ordered[-1]}"


def _body(node: ast.FunctionDef) -> int:
    """Lines of a function's statements, its docstring left out."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def _parameters(node: ast.FunctionDef) -> int:
    return len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])


def _comments(path: Path) -> int:
    with path.open("rb") as file:
        return sum(t.type == tokenize.COMMENT for t in tokenize.tokenize(file.readline))


def _docstrings(tree: ast.AST) -> list[str]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
    return [t for n in ast.walk(tree) if isinstance(n, kinds) and (t := ast.get_docstring(n))]


def _repeated(trees: Iterable[ast.Module]) -> list[str]:
    """Public and private names that more than one module defines at its top."""
    counts: Counter[str] = Counter()
    for tree in trees:
        names = set()
        for node in tree.body:
            if _is_function(node) or isinstance(node, ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        counts.update(n for n in names if n not in ("__all__", "T", "_"))
    return [name for name, count in counts.items() if count > 1]


def _room(module: str) -> str:
    """The folder of a module; a module at the package's top is a room by itself."""
    return module.removeprefix("sage_select.").split(".")[0]


def _arrows(root: Path, trees: dict[Path, ast.Module]) -> set[tuple[str, str]]:
    arrows = set()
    for path, tree in trees.items():
        parts = path.relative_to(root).with_suffix("").parts
        if parts == ("sage_select", "__init__"):
            continue  # the exports name every folder
        own = _room(".".join(parts))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sage_select."):
                arrows.add((own, _room(node.module)))
    return {(a, b) for a, b in arrows if a != b}


def _in_circles(arrows: set[tuple[str, str]]) -> set[str]:
    """Rooms from which arrows lead back to themselves."""

    def reachable(start: str) -> set[str]:
        seen, frontier = set(), {start}
        while frontier:
            frontier = {b for a, b in arrows if a in frontier} - seen
            seen |= frontier
        return seen

    return {room for room in {a for a, _ in arrows} if room in reachable(room)}


if __name__ == "__main__":
    tables = [figures(Path(name)) for name in sys.argv[1:] or ["."]]
    for name in dict.fromkeys(name for table in tables for name in table):
        print(f"{name:50}", *(f"{table.get(name, '-')!s:>18}" for table in tables))
