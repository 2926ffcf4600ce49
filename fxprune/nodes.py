"""Facts about single nodes of a ``torch.fx`` graph, and copies of whole graphs."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.operator_schemas import get_signature_for_torch_op

from .guards import CHECKS

ADDS = frozenset(["add", "add_", "iadd", "__add__", "__radd__", "__iadd__"])
"""Names of the operators that add, as :func:`operator_name` gives them."""


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """A copy of a graph with the same node names, and its nodes by name.

    A node that is added to it does not take the name of one that was erased: the names are those by which
    the nodes of the original graph are known.
    """
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = new.graph_copy(graph, mapping)
    for old in graph.nodes:
        if old.op == "output":
            new.output(result, old.type).meta = dict(old.meta)
    new._codegen = graph._codegen
    new._graph_namespace._used_names |= graph._graph_namespace._used_names
    return new, {node.name: node for node in new.nodes}


def mutable(tree: Any) -> Any:
    """Plain lists and dicts in place of torch.fx's immutable ones."""
    if isinstance(tree, list):
        return [mutable(item) for item in tree]
    if type(tree) is tuple:  # named ones stay what they are
        return tuple(mutable(item) for item in tree)
    if isinstance(tree, dict):
        return {key: mutable(item) for key, item in tree.items()}
    return tree


def is_assertion(node: fx.Node, args: Any) -> bool:
    """Whether a node asserts something of the values of a tensor, which are not known on shapes alone."""
    if node.target in CHECKS:
        return True
    return node.target is torch._assert and bool(args) and isinstance(args[0], torch.Tensor)


def counts_entries(node: fx.Node) -> bool:
    """Whether a node is the number of entries of a tensor, or of a shape."""
    return (node.op == "call_method" and node.target in ("numel", "nelement")) or node.target is torch.numel


def size_read(node: fx.Node) -> tuple[fx.Node, list[Any]] | None:
    """The tensor whose sizes a node reads, and the keys that pick some of them; None where it reads none.

    ``x.size(1)`` gives ``x, [1]``; ``x.shape[1:][0]`` gives ``x, [slice(1, None), 0]``; ``x.shape`` and
    ``x.numel()``, which read all, give ``x, []``.
    """
    keys: list[Any] = []
    whole: Any = node
    while whole.target is operator.getitem and isinstance(whole.args[0], fx.Node):
        whole, key = whole.args
        keys.insert(0, key)
    if whole.op == "call_method" and whole.target == "size":
        keys = [*whole.args[1:], *keys]
    elif not counts_entries(whole) and not (whole.target is getattr and whole.args[1] == "shape"):
        return None
    tensor = whole.args[0]
    return (tensor, keys) if isinstance(tensor, fx.Node) else None


def by_position(
    kind: str,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    module: Callable[[str], nn.Module],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call as the rest of fxprune looks for it: ``chunk(x, chunks=2)`` for ``chunk(input=x, chunks=2)``.

    So for the first argument of functions and of modules (``module`` gives them by path), and for
    ``x.size(dim=1)``.
    """
    first = "dim" if kind == "call_method" and target == "size" else None
    if kind == "call_function" and not args:
        overloads = [list(signature.parameters) for signature in get_signature_for_torch_op(target) or ()]
        fitting = [names for names in overloads if names and names[0] in kwargs]
        first = max(fitting, key=lambda names: len(kwargs.keys() & names), default=[None])[0]
    elif kind == "call_module" and not args:
        parameters = inspect.signature(module(target).forward).parameters.values()
        first = next((p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD), None)
    if first is None or first not in kwargs:
        return args, dict(kwargs)
    return (*args, kwargs[first]), {name: value for name, value in kwargs.items() if name != first}


def operator_name(node: fx.Node) -> str:
    """``view`` for ``x.view``, ``torch.Tensor.view`` and ``aten.view.default`` alike."""
    target = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return ""
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return str(schema.name).partition("::")[2]
    return str(getattr(target, "__name__", target))


def writes(node: fx.Node) -> bool:
    """Whether a node may write into what it is given."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name.endswith("_") or name == "setitem"


_COMPARISONS = frozenset(
    [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.not_]
)


_FINITE = {"isfinite": True, "isinf": False, "isneginf": False, "isposinf": False, "isnan": False}
_COUNTS = frozenset(["sum", "count_nonzero"])
_OF_ANSWERS: dict[str, Callable[..., Any] | None] = {
    **dict.fromkeys([*_COUNTS, "any", "all", "item", "bool", "to", "cpu", "detach", "amax", "max"]),
    **dict.fromkeys(["not", "invert", "logical_not", "bitwise_not"], operator.not_),
    **dict.fromkeys(["or", "logical_or", "bitwise_or"], operator.or_),
    **dict.fromkeys(["and", "logical_and", "bitwise_and"], operator.and_),
    "eq": operator.eq, "ne": operator.ne, "gt": operator.gt, "lt": operator.lt, "ge": operator.ge,
    "le": operator.le,
}  # fmt: skip
"""What operators make of such answers; None for those that leave them as they are, or count them."""


def if_finite(value: Any, known: dict[fx.Node, Any] | None = None) -> bool | int | None:
    """What a test for infinite values and NaN answers where there are none.

    Args:
        value: a node, as that of ``torch.isnan(x).any()``, or a constant.
        known: answers that were found, to fill.

    Returns:
        The answer, which is that of all entries; None for what is no such test.
    """
    if not isinstance(value, fx.Node):
        return value if isinstance(value, (bool, int)) else None
    known = {} if known is None else known
    if value not in known:
        known[value] = _answer(value, known)
    found: bool | int | None = known[value]
    return found


def _answer(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    name = operator_name(node).strip("_")
    if name in _FINITE:
        return _FINITE[name]
    if name not in _OF_ANSWERS or not any(isinstance(argument, fx.Node) for argument in node.args):
        return None
    answer = _OF_ANSWERS[name]
    given = [if_finite(argument, known) for argument in node.args]
    if any(a is None and isinstance(b, fx.Node) for a, b in zip(given, node.args, strict=True)):
        return None
    if name in _COUNTS:
        return 0 if given[0] is False else None  # nobody knows how many entries there are
    if answer is None:
        return given[0]
    return None if None in given else answer(*given)


def finite_tests(node: fx.Node) -> Iterator[fx.Node]:
    """The tests of single values behind a node that :func:`if_finite` has an answer for."""
    todo, seen = [node], {node}
    while todo:
        part = todo.pop()
        if operator_name(part).strip("_") in _FINITE:
            yield part
            continue
        new = {argument for argument in part.args if isinstance(argument, fx.Node)} - seen
        seen |= new
        todo += new


def drop_questions(graph: fx.Graph) -> None:
    """Remove what nothing reads but control flow did: the graph has what it did then.

    Those are comparisons, which would be made again, and ``torch.export`` would build in what they compare;
    and tests for infinite values and NaN.
    """
    for node in reversed(graph.nodes):
        asks = node.op == "call_function" and node.target in _COMPARISONS
        if not node.users and (asks or if_finite(node) is not None):
            graph.erase_node(node)


def describe_source(node: fx.Node | None) -> str:
    """``file.py:12 in forward`` for a node, or an empty string where the source is unknown."""
    source = node.meta.get("source") if node is not None else None
    if not source:
        return ""
    file, line, function = source
    return f"{file}:{line} in {function}"
