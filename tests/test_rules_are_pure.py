"""Rules speak of what an operator does, in the coupler's public verbs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxprune.coupling.rules

FILES = sorted(Path(fxprune.coupling.rules.__file__).parent.glob("*.py"))


def is_inner(name: str) -> bool:
    return name.startswith("_") or name in ("frozen", "inexact", "edges", "by_row", "anchors")


def reaches(tree: ast.AST) -> Iterator[str]:
    """What of the coupler is used that is not for rules, and what of values is written."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and ast.unparse(node.value) in ("c", "c.units")
            and is_inner(node.attr)
        ):
            yield f"line {node.lineno}: c.{node.attr}"
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if "storage" in ast.unparse(target) or "on_use" in ast.unparse(target):
                yield f"line {node.lineno}: {ast.unparse(target)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rules_use_public_verbs(path: Path) -> None:
    assert not list(reaches(ast.parse(path.read_text())))


@pytest.mark.parametrize(
    "line", ["c._here(1)", "c.frozen.append(event)", "value.storage[0] = True", "c.units.anchors"]
)
def test_what_is_not_for_rules_is_found(line: str) -> None:
    assert list(reaches(ast.parse(line)))
