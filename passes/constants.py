"""Numbers computed from narrowed sizes: ``q * C ** -0.5`` keeps the original ``C``.

Burnt in before the literals are rewritten, so that sizes which were computed become literals, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..coupling.units import Value
from ..program import Program
from .base import Narrowing, Pass, copy_graph, operator_name

_NUMBERS = (int, float)


@dataclass(frozen=True)
class KeepConstants(Pass):
    """Burn in, wherever a tensor is made, numbers that would change because an axis became narrower.

    A number that also depends on a size that may vary between runs (batch, space) stays computed.
    """

    def requires(self, program: Program, narrowing: Narrowing) -> Sequence[Any]:
        stale = _stale(program, narrowing)
        return [
            (node.name, used)
            for node in program.graph.nodes
            if node.op != "output"
            and (used := [n.name for n in node.all_input_nodes if n.name in stale])
            and any(isinstance(leaf, Value) for leaf in pytree.tree_leaves(narrowing.tree(node.name)))
        ]

    def run(self, program: Program, narrowing: Narrowing, sites: Sequence[Any]) -> Program:
        graph, nodes = copy_graph(program.graph)
        had_users = {node.name for node in program.graph.nodes if node.users}
        for name, stale in sites:
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
    sizes: dict[str, tuple[str, ...]] = {}  # per node: for each entry "narrowed", "fixed" or "free"
    stale: set[str] = set()
    for node in program.graph.nodes:
        result = narrowing.tree(node.name)
        kinds = _of_shape(node, narrowing)
        if kinds is not None:
            sizes[node.name] = kinds
        elif isinstance(result, _NUMBERS) and not isinstance(result, bool):
            inputs = node.all_input_nodes
            if (
                operator_name(node) == "getitem"
                and inputs
                and inputs[0].name in sizes
                and isinstance(node.args[1], int)
            ):
                kind: tuple[str, ...] = (sizes[inputs[0].name][node.args[1]],)
            else:
                kind = tuple(k for n in inputs for k in sizes.get(n.name, ("free",)))
            sizes[node.name] = kind
        if isinstance(result, _NUMBERS) and node.name in sizes:
            kinds = sizes[node.name]
            if "narrowed" in kinds and "free" not in kinds:
                stale.add(node.name)
    return stale


def _of_shape(node: fx.Node, narrowing: Narrowing) -> tuple[str, ...] | None:
    """What the sizes that a node reads off a tensor depend on."""
    name = operator_name(node)
    if name not in ("size", "getattr", "numel", "len") or not node.args:
        return None
    value = narrowing.value(node.args[0])
    if value is None or (name == "getattr" and node.args[1] != "shape"):
        return None
    kinds = []
    for dim in range(len(value.shape)):
        label = value.label(dim)
        kinds.append("free" if label is None else "narrowed" if narrowing.narrows(label) else "fixed")
    if name == "size" and len(node.args) > 1 and isinstance(node.args[1], int):
        return (kinds[node.args[1]],)
    if name == "len":
        return (kinds[0],)
    return tuple(kinds)
