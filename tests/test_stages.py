"""The stages in their order: what comes later imports what comes before, never the other way round."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ORDER = (
    # what all stages speak of
    "errors", "guards", "repeats", "files", "trees", "random_numbers", "inputs", "calls",
    "module_registry", "nodes", "convolution", "time_steps", "graph_record", "nn", "value_dependent",
    "known_values", "known_shapes", "modes", "graph_module", "program", "region_program", "sizes",
    # the stages: capture, couple and group, score, plan, rewrite
    "capture", "coupling", "importance", "measure", "planning", "passes",
    # the stages composed
    "same_calls", "verify_model", "analysis", "origins", "saving", "configurations", "pretrained",
    "compensation", "other_ways",
    "branches_in_class", "own_class", "deciding", "reuse",
    "functional", "api",
    # what is done with the result: all modules that are not named here; no stage may import one of them
    USES := "...",
    # the public names, and the command line, which nothing imports
    "fxprune", "cli",
)  # fmt: skip

CONVENIENT = {
    ("planning/plan.py", "api"), ("planning/plan.py", "iterative"), ("planning/plan.py", "training"),
    ("coupling/graph.py", "report"), ("saving.py", "fxprune"),
    ("planning/plan.py", "pages"), ("coupling/graph.py", "pages"), ("coupling/groups.py", "pages"),
}  # fmt: skip
"""Methods of the plan and of the graph that lead on to later stages, and the version that files name. They
import when they are called."""


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for folder, prefix in ((ROOT / "fxprune", "fxprune"), (ROOT / "passes", "fxprune.passes")):
        for path in sorted(folder.rglob("*.py")):
            parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def unit(module: str) -> str:
    """The stage that a module belongs to."""
    return module.split(".")[1] if "." in module else "fxprune"


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """The modules that a module imports at run time, and whether it does so as soon as it is imported."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def walk(node: ast.AST, early: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and child.level:
                base = package.split(".")[: len(package.split(".")) - child.level + 1]
                target = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    yield (full if (full := f"{target}.{alias.name}") in known else target), early
            elif isinstance(child, ast.Import):
                yield from ((a.name, early) for a in child.names if a.name.partition(".")[0] == "fxprune")
            inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, early and not inner)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def place(name: str) -> int:
    """Where a stage stands in the order."""
    return ORDER.index(name if name in ORDER else USES)


def test_the_order_names_what_there_is() -> None:
    assert {*ORDER} - {unit(name) for name in modules()} == {USES}
    assert len(set(ORDER)) == len(ORDER)


def test_imports_run_downwards() -> None:
    known = modules()
    wrong, used = [], set()
    for name, path in known.items():
        for target, early in imports(name, path, known):
            a, b = unit(name), unit(target)
            if a == b or place(b) < place(a) or place(b) == place(a) == place(USES):
                continue
            file = path.relative_to(ROOT / ("fxprune" if "fxprune" in path.parts else ".")).as_posix()
            if not early and (file, b) in CONVENIENT:
                used.add((file, b))
            elif a != "fxprune":
                wrong.append(f"{file} imports {target}, which comes later")
    assert wrong == []
    assert used == CONVENIENT, "exceptions that are not needed any more"
