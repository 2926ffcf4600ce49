"""Numbers computed from narrowed sizes: ``q * C ** -0.5`` keeps the original ``C``.

Burnt in before the literals are rewritten, so that sizes which were computed become literals, too.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..coupling.number_origins import FREE, NUMBERS, NumberOrigins
from ..coupling.units import Value
from ..nodes import operator_name
from ..program import Program
from .base import Narrowing, Pass, editable


@dataclass(frozen=True)
class KeepConstants(Pass):
    """Burn in, wherever a tensor is made, numbers that would change because an axis became narrower.

    A number that also depends on a size that may vary between runs (batch, space) stays computed; the extent
    of a batch of rows (batch x heads) is scaled up to what it was.
    """

    def requires(self, program: Program, narrowing: Narrowing) -> Sequence[Any]:
        stale = _stale(program, narrowing)
        batches = [node.name for node in program.graph.nodes if _batch_of_rows(node, narrowing) is not None]
        return [*((name, []) for name in batches)] + [
            (node.name, used)
            for node in program.graph.nodes
            if node.op != "output"
            and (used := [n.name for n in node.all_input_nodes if n.name in stale])
            and any(isinstance(leaf, Value) for leaf in pytree.tree_leaves(narrowing.tree(node.name)))
        ]

    def run(self, program: Program, narrowing: Narrowing, sites: Sequence[Any]) -> Program:
        graph, nodes = editable(program, narrowing)
        had_users = {node.name for node in program.graph.nodes if node.users}
        for name, stale in sites:
            factors = _batch_of_rows(nodes[name], narrowing)
            if factors is not None:
                node, users = nodes[name], list(nodes[name].users)
                with graph.inserting_after(node):
                    scaled_up = scale(graph, node, *factors)
                for user in users:
                    user.replace_input_with(node, scaled_up)
            _burn_in(nodes[name], {nodes[s]: narrowing.tree(s) for s in stale})
        for node in reversed(list(graph.nodes)):  # what computed the numbers
            if (
                node.name in had_users
                and not node.users
                and isinstance(narrowing.tree(node.name), (*NUMBERS, tuple))
            ):
                graph.erase_node(node)
        return replace(program, graph=graph)


def _burn_in(node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
    """Give ``node`` the numbers in ``values`` in place of the nodes that computed them."""

    def value(used: fx.Node) -> Any:
        return values.get(used, used)

    node.args = map_arg(node.args, value)
    node.kwargs = map_arg(node.kwargs, value)


def _stale(program: Program, narrowing: Narrowing) -> set[str]:
    """Nodes that are numbers, depend on narrowed sizes, and on no size that varies between runs."""
    sizes = origins(narrowing)
    stale: set[str] = set()
    for node in program.graph.nodes:
        kinds = sizes.of(node)
        if (
            kinds
            and isinstance(narrowing.tree(node.name), NUMBERS)
            and "narrowed" in kinds
            and FREE not in kinds
        ):
            stale.add(node.name)
    return stale


def origins(narrowing: Narrowing) -> NumberOrigins:
    """What numbers depend on: each entry is ``"narrowed"``, ``"fixed"`` (a labelled dimension that stays) or
    ``"free"`` (one that may vary between runs, if only because it holds a batch of rows).
    """

    def kind(value: Value, dim: int) -> str:
        label = value.label(dim)
        if label is None or (narrowing.narrows(label) and narrowing.repeats(label)):
            return FREE
        return "narrowed" if narrowing.narrows(label) else "fixed"

    return NumberOrigins(lambda node: narrowing.tree(node.name), kind)


def computed(number: Any, narrowing: Narrowing, known: dict[str, Any]) -> Any:
    """What a node computes from narrowed sizes; None where it is no number that can be told.

    ``known`` remembers the answers.
    """
    if isinstance(number, fx.Node):
        if number.name not in known:
            known[number.name] = _compute(number, narrowing, known)
        return known[number.name]
    return number


def _compute(node: fx.Node, narrowing: Narrowing, known: dict[str, Any]) -> Any:
    value = narrowing.value(node.args[0]) if node.args else None
    if value is not None:
        shape = narrowing.shape(value)
        if operator_name(node) in ("size", "sym_size"):
            dim = node.args[1] if len(node.args) > 1 else None
            return shape[dim] if isinstance(dim, int) else shape
        return shape if operator_name(node) == "getattr" and node.args[1] == "shape" else None
    args = [computed(arg, narrowing, known) for arg in node.args]
    if node.op == "call_function" and not node.kwargs and all(arg is not None for arg in args):
        target: Any = node.target
        with contextlib.suppress(Exception):  # whatever a user's function raises
            return target(*args)
    return None


def _batch_of_rows(node: fx.Node, narrowing: Narrowing) -> tuple[int, int] | None:
    """Old and new extent of a narrowed batch of rows, where the node reads it off a tensor."""
    name = operator_name(node)
    if name == "getitem" and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
        read, dim = node.args[0], node.args[1]
        if operator_name(read) not in ("size", "getattr") or not isinstance(narrowing.tree(read.name), tuple):
            return None
    elif name == "size" and len(node.args) > 1 and isinstance(node.args[1], int):
        read, dim = node, node.args[1]
    else:
        return None
    value = narrowing.value(read.args[0])
    label = value.label(dim % len(value.shape)) if value is not None else None
    if value is None or label is None or not narrowing.narrows(label) or not narrowing.repeats(label):
        return None
    return value.shape[dim], narrowing.size(value, dim % len(value.shape))


def scale(graph: fx.Graph, number: fx.Node, new: int, old: int) -> fx.Node:
    """Nodes that compute ``number * new / old``."""
    factor = math.gcd(new, old)
    product = graph.call_function(operator.mul, (number, new // factor))
    with graph.inserting_after(product):
        return graph.call_function(operator.floordiv, (product, old // factor))
