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

from ..coupling.units import Value
from ..nodes import operator_name
from ..program import Program
from .base import Narrowing, Pass, editable

_NUMBERS = (int, float)


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
                and isinstance(narrowing.tree(node.name), (*_NUMBERS, tuple))
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
    sizes: dict[str, tuple[str, ...]] = {}
    stale: set[str] = set()
    for node in program.graph.nodes:
        kinds = origins(node, narrowing, sizes)
        if (
            kinds
            and isinstance(narrowing.tree(node.name), _NUMBERS)
            and "narrowed" in kinds
            and "free" not in kinds
        ):
            stale.add(node.name)
    return stale


def origins(node: fx.Node, narrowing: Narrowing, known: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """What the number (or the shape, entry by entry) that a node computes depends on.

    Each entry is ``"narrowed"``, ``"fixed"`` (a labelled dimension that stays) or ``"free"`` (one that may
    vary between runs, if only because it holds a batch of rows); None for a node that computes no number.
    ``known`` remembers the answers.
    """
    if node.name not in known:
        result = narrowing.tree(node.name)
        kinds = _of_shape(node, narrowing)
        if kinds is None:
            if not isinstance(result, _NUMBERS) or isinstance(result, bool):
                return None
            inputs = node.all_input_nodes
            of_inputs = [origins(n, narrowing, known) for n in inputs]
            if operator_name(node) == "getitem" and inputs and of_inputs[0] and isinstance(node.args[1], int):
                kinds = (of_inputs[0][node.args[1]],)
            else:
                kinds = tuple(k for found in of_inputs for k in found or ("free",))
        known[node.name] = kinds
    return known[node.name]


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


def _of_shape(node: fx.Node, narrowing: Narrowing) -> tuple[str, ...] | None:
    """What the sizes that a node reads off a tensor depend on."""
    name = operator_name(node)
    if name not in ("size", "sym_size", "getattr", "numel", "sym_numel", "len") or not node.args:
        return None
    value = narrowing.value(node.args[0])
    if value is None or (name == "getattr" and node.args[1] != "shape"):
        return None
    kinds = []
    for dim in range(len(value.shape)):
        label = value.label(dim)
        free = label is None or (narrowing.narrows(label) and narrowing.repeats(label))
        kinds.append("free" if free else "narrowed" if narrowing.narrows(label) else "fixed")
    if name in ("size", "sym_size") and len(node.args) > 1 and isinstance(node.args[1], int):
        return (kinds[node.args[1]],)
    if name == "len":
        return (kinds[0],)
    return tuple(kinds)
