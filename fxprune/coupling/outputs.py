"""What a model returns: which outputs keep layers wide, and outputs that hold zeros where something went.

Outputs keep their shapes. That keeps whatever computes them as wide as it is; where a hidden state is
returned, too, that is most of the network. Either such an output may become narrower (``free_outputs``), or
it holds zeros in place of what was removed (``fill_outputs``), as the masked original's does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.utils import _pytree as pytree

from ..modes import either, holds
from ..nn import Fill, Pack
from ..nodes import copy_graph
from ..program import Program
from ..trees import Leaf, Structure, flatten
from .groups import Grouping
from .interpreter import OUTPUT, Run
from .units import FIXED, State, Value

_LAST_LAYERS = 2
"""What may stand in front of an output and have its width: a layer and its normalisation."""


@dataclass(frozen=True)
class _Ends:
    """The nodes whose values a graph returns.

    Attributes:
        holder: the node that takes them: the graph's output, or what packs it.
        nodes: one for each leaf of ``structure``.
        structure: what they are returned in.
        place: number of the argument that holds them; None where they are the arguments.
    """

    holder: fx.Node
    nodes: list[Any]
    structure: Structure
    place: int | None = 0

    def put(self, nodes: list[Any]) -> None:
        """Return these in place of ``nodes``."""
        if self.place is None:
            self.holder.args = tuple(nodes)
        else:
            self.holder.update_arg(self.place, self.structure.rebuild(nodes))


def _ends(program: Program, graph: fx.Graph) -> _Ends:
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    holder, place = output, 0
    if isinstance(node := output.args[0], fx.Node) and node.target is either:  # of the mode of capture
        condition: Any = node.args[0]
        holder, place = node, 1 if holds(condition, program.skeleton.training) else 2
    tree = holder.args[place]
    if isinstance(tree, fx.Node) and tree.op == "call_module":
        pack = program.modules[str(tree.target)]
        if isinstance(pack, Pack):
            return _Ends(tree, list(tree.args), pack.structure, None)
    nodes, structure = flatten(_opened(tree), (fx.Node,))
    return _Ends(holder, nodes, structure, place)


def _opened(tree: Any) -> Any:
    """What is returned, with the named tuples that nodes build in place of these nodes."""

    def opened(leaf: Any) -> Any:
        if not (isinstance(leaf, fx.Node) and hasattr(leaf.target, "_fields")):
            return leaf
        build: Any = leaf.target
        return _opened(build(*leaf.args, **leaf.kwargs))

    return pytree.tree_map(opened, tree)


def fills(program: Program) -> dict[Leaf, fx.Node]:
    """The outputs that hold zeros in place of what goes, and the node that fills them."""
    ends = _ends(program, program.graph)
    pairs = zip(ends.structure.leaves, ends.nodes, strict=True)
    return {leaf: node for leaf, node in pairs if isinstance(node, fx.Node) and _fills(program, node)}


def _fills(program: Program, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(program.modules[str(node.target)], Fill)


def fill(program: Program, patterns: Sequence[str]) -> Program:
    """The program with a :class:`~fxprune.nn.Fill` before each output that ``patterns`` name."""
    graph, _ = copy_graph(program.graph)
    ends, modules = _ends(program, graph), dict(program.modules)
    training = program.skeleton.training.get("", False)
    new = list(ends.nodes)
    for number, (leaf, node) in enumerate(zip(ends.structure.leaves, ends.nodes, strict=True)):
        wanted = leaf.named(patterns) and not leaf.named(program.free_outputs)
        if wanted and isinstance(node, fx.Node) and not _fills(program, node):
            path = re.sub(r"\W", "_", f"_fill_{leaf}")
            while path in modules or path in program.skeleton.training:
                path += "_"
            modules[path] = Fill().train(training)
            with graph.inserting_before(ends.holder):
                new[number] = graph.call_module(path, (node,))
            new[number].meta = {key: value for key, value in node.meta.items() if key == "source"}
    ends.put(new)
    for node in reversed(list(graph.nodes)):
        if hasattr(node.target, "_fields") and not node.users:
            graph.erase_node(node)
    return replace(program, graph=graph, modules=modules)


def beside(program: Program, run: Run) -> set[Leaf]:
    """Outputs that are returned beside the result, though the network goes on with them.

    In a class with named fields, the first that is no mere number holds the result; what else there is, a
    layer reads, too. In a list, tuple or dict all are taken for results.
    """
    ends = _ends(program, program.graph)
    outputs = run.outputs.get("", {})
    result = next((leaf.path[0] for leaf, value in outputs.items() if value.shape and leaf.path), None)
    if not ends.structure.named or result is None:
        return set()

    def computes(node: fx.Node) -> bool:
        return any(isinstance(value, Value) for value in pytree.tree_leaves(run.values.get(node)))

    return {
        leaf
        for leaf, node in zip(ends.structure.leaves, ends.nodes, strict=True)
        if leaf in outputs and leaf.path[0] != result and _read(program, node, ends.holder, computes)
    }


def _read(program: Program, node: fx.Node, by: fx.Node, computes: Callable[[fx.Node], bool]) -> bool:
    """Whether the tensor of ``node``, or what it is a mere copy or view of, is read by others than ``by``."""
    while not any(user is not by and computes(user) for user in node.users):
        if node.op == "call_module" and any(name.startswith(f"{node.target}.") for name in program.tensors):
            return False
        if len(node.all_input_nodes) != 1:
            return False
        node, by = node.all_input_nodes[0], node
    return True


def holding(
    outputs: Mapping[Leaf, Value],
    grouping: Grouping,
    states: Collection[State],
    among: Collection[Leaf],
) -> tuple[set[Leaf], int]:
    """Which of the outputs ``among`` all keep several layers wide that would not be but for them.

    The last layer in front of an output does not count, as its width is what the output is.

    Returns:
        The outputs, and how many parameter entries these layers have.
    """
    otherwise = grouping.prunable.copy()  # goes already, or stays for another reason, too
    otherwise[FIXED] = True
    for event in grouping.events:
        if event.reason != OUTPUT:
            otherwise[grouping.roots[event.ids]] = True
    holds: dict[Leaf, NDArray[np.bool_]] = {}
    for leaf, value in outputs.items():
        holds[leaf] = np.zeros_like(otherwise)
        for label in filter(None, map(value.label, range(len(value.shape)))):
            holds[leaf][grouping.roots[label.ids]] = True
        holds[leaf] &= ~otherwise
    held: dict[tuple[Leaf, ...], dict[str, int]] = {}
    for state in states:
        if isinstance(state.tensor, torch.nn.Parameter):
            for label in filter(None, state.axes):
                classes = grouping.roots[label.ids]
                leaves = tuple(leaf for leaf, mask in holds.items() if mask[classes].any())
                held.setdefault(leaves, {})[state.name] = math.prod(state.shape)
    found: set[Leaf] = set()
    entries: dict[str, int] = {}
    for leaves, sizes in held.items():
        layers = {name.rpartition(".")[0] for name in sizes}
        if leaves and len(layers) > _LAST_LAYERS and set(leaves) <= set(among):
            found.update(leaves)
            entries.update(sizes)
    return found, sum(entries.values())


def short_names(found: Collection[Leaf], outputs: Collection[Leaf]) -> tuple[str, ...]:
    """Names for some of the ``outputs``; that of a tree where all in it are found."""
    split = {leaf.path[:1] for leaf in outputs if leaf not in found}  # trees with other leaves, too
    whole = (Leaf(leaf.path[:1], False) for leaf in outputs)
    given = (
        leaf if tree.path in split else tree
        for leaf, tree in zip(outputs, whole, strict=True)
        if leaf in found
    )
    return tuple(dict.fromkeys(map(str, given)))


def hold_zeros(names: Sequence[str]) -> str:
    """What to say of the outputs that are filled; empty where there are none."""
    if not names:
        return ""
    return (
        f"outputs that hold zeros in place of what is removed: {', '.join(names)}; fill_outputs=() "
        f"(--fill-output none) keeps them, and the layers that they come from, as they are"
    )


__all__ = ["beside", "fill", "fills", "hold_zeros", "holding", "short_names"]
