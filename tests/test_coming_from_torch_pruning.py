"""The table for users of Torch-Pruning: names exist, arguments exist, nothing is left out."""

from __future__ import annotations

import ast
import inspect
import re
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import fxprune

TEXT = (Path(__file__).parent.parent / "examples" / "coming_from_torch_pruning.md").read_text(
    encoding="utf-8"
)
CODE = re.findall(r"`([^`\n]+)`", TEXT)
NAMES = sorted(set(re.findall(r"\bfxprune(?:\.\w+)+", " ".join(CODE))))


def resolve(name: str) -> Any:
    """The object, or the field of a dataclass."""
    parts = name.split(".")[1:]
    for count in range(len(parts), -1, -1):
        try:
            found: Any = import_module(".".join(["fxprune", *parts[:count]]))
        except ImportError:
            continue
        return reduce(member, parts[count:], found)
    raise AssertionError(name)


def member(owner: Any, name: str) -> Any:
    if name in getattr(owner, "__dataclass_fields__", ()):
        return owner.__dataclass_fields__[name]
    return getattr(owner, name)


@pytest.mark.parametrize("name", NAMES)
def test_name_exists(name: str) -> None:
    assert resolve(name) is not None
    assert name.split(".")[1] in {*fxprune.__all__, "importance", "iterative", "measure"}


SOURCE = "\n".join(code for code in CODE if code.startswith("fxprune") and "(" in code)
CALLS = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("call", CALLS, ids=ast.unparse)
def test_arguments_exist(call: ast.Call) -> None:
    signature = inspect.signature(resolve(ast.unparse(call.func)))
    keywords = {str(keyword.arg): None for keyword in call.keywords}
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        assert keywords.keys() <= {*signature.parameters, *inspect.signature(fxprune.plan).parameters}
    else:
        signature.bind(*[None] * len(call.args), **keywords)


def test_nothing_is_left_out() -> None:
    """Classes, functions and arguments of the installed Torch-Pruning are all named."""
    tp = pytest.importorskip("torch_pruning")
    words = set(re.findall(r"\w+", " ".join(CODE)))
    modules = [tp, tp.dependency, tp.pruner, tp.function, tp.importance, tp.ops, tp.serialization, tp.utils]
    public = {
        name
        for module in [*modules, tp.utils.benchmark, tp.utils.compute_mat_grad]
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (
            str(getattr(value, "__module__", "")).startswith("torch_pruning")
            or (name.isupper() and isinstance(value, (int, str, tuple)))
        )
    }
    assert len(public) > 90
    for owner in (tp.DependencyGraph, tp.BasePruner, tp.Group):
        public |= {
            name for name in vars(owner) if not name.startswith("_") and callable(getattr(owner, name))
        }
    for pruner in (tp.BasePruner, tp.BNScalePruner, tp.GroupNormPruner, tp.GrowingRegPruner):
        public |= set(inspect.signature(pruner.__init__).parameters)
    public |= set(inspect.signature(tp.DependencyGraph.build_dependency).parameters)
    public |= {"print_tool", "op_counter"}
    common = {"try_contiguous", "self", "model", "importance", "example_inputs", "group", "args", "kwargs"}
    assert public - words - common == set()
