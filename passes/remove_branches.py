"""Residual branches are taken out of a network as a whole: ``y = x + f(x)`` becomes ``y = x``.

This comes before all narrowing: widths are decided for what is left.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import fx

from ..coupling.branches import Branch
from ..coupling.graph import CouplingGraph
from ..errors import PlanError
from ..nodes import copy_graph
from ..planning.patterns import nearest
from ..program import Program

_DIM = re.compile(r"\[\d+\]$")


def without_branches(graph: CouplingGraph, names: Collection[str]) -> CouplingGraph:
    """The analysis of the network without these residual branches, in place of one with others or with all.

    Raises:
        PlanError: for a branch that the network does not have, or that cannot go; names those that can.
    """
    whole = graph.whole
    for name in names:
        if name not in whole.branches:
            raise PlanError(unknown(whole, name))
    # Finding them takes time, so it is done only where there are names.
    ordered = tuple(name for name in whole.branches if name in names) if names else ()
    if ordered == graph.removed_branches:
        return graph
    if not ordered:
        return whole.hold(set(graph.held)) if set(graph.held) - set(whole.held) else whole
    program = remove_branches(whole.captured.program, [whole.branches[name] for name in ordered])
    nodes = {node.name for node in program.graph.nodes} | program.tensors.keys()
    held = tuple(name for name in graph.held if _DIM.sub("", name) in nodes or name.startswith("*"))
    return CouplingGraph(replace(whole.captured, program=program), graph.source, held, whole, ordered)


def unknown(graph: CouplingGraph, name: str) -> str:
    """What to say of a name that is that of no residual branch."""
    if not graph.branches:
        reasons = "; ".join(f"at {node}, {why}" for node, why in [*graph.kept_additions.items()][:3])
        return (
            f"{graph.captured.class_name} has no residual branch that can be removed, so there is no {name!r}"
            f"{f' ({reasons})' if reasons else ''}."
        )
    known = list(graph.branches)
    close = nearest(name, known, 1)
    hint = f"; the nearest is {close[0]!r}" if close else ""
    why = f": {graph.kept_additions[name]}" if name in graph.kept_additions else ""
    more = f" and {len(known) - 12} more (see graph.branches)" if len(known) > 12 else ""
    return (
        f"there is no residual branch {name!r} that can be removed{why}{hint}. There are "
        f"{', '.join(known[:12])}{more}."
    )


def remove_branches(program: Program, branches: Sequence[Branch]) -> Program:
    """``program`` without these residual branches; nothing in it is changed.

    What read the sum reads the stream, or a copy of it where it is written into. Parameters, buffers and
    modules that served a branch alone are gone.
    """
    graph, nodes = copy_graph(program.graph)
    gone = {name for branch in branches for name in branch.nodes}
    for branch in branches:
        addition = nodes[branch.addition]
        if branch.addition in gone:  # within a branch that goes, too
            continue
        stream = next(node for node in addition.all_input_nodes if node.name not in branch.nodes)
        if branch.copies:
            with graph.inserting_before(addition):
                clone = graph.call_method("clone", (stream,))
            clone.meta = {key: value for key, value in addition.meta.items() if key == "source"}
            stream = clone
        addition.replace_all_uses_with(stream)
        gone.add(branch.addition)
    for node in reversed(list(graph.nodes)):
        if node.name in gone:
            graph.erase_node(node)
    dropped = {name for branch in branches for name in branch.tensors}
    unused = _called(program.graph) - _called(graph)
    return _without_tensors(replace(program, graph=graph, seen={}), dropped, unused)


def _called(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _without_tensors(program: Program, dropped: set[str], unused: set[str]) -> Program:
    """The program without these tensors, the ``unused`` leaf modules, and what held nothing else."""
    skeleton = program.skeleton
    tensors = {name: tensor for name, tensor in program.tensors.items() if name not in dropped}
    modules = {path: leaf for path, leaf in program.modules.items() if path not in unused}
    lost: set[str] = set()
    holds = {_parent(name) for name in tensors}
    inside: dict[str, list[str]] = defaultdict(list)
    for path in skeleton.training:
        inside[_parent(path)].append(path)
    emptied = {_parent(name) for name in dropped}
    for path in reversed([*skeleton.training]):  # children come before their parents
        first = skeleton.aliases.get(path, path)
        children = [child for child in inside[path] if child != path]
        empty = path not in holds and all(child in lost for child in children)
        if path and (_within(first, unused) or (empty and (children or path in emptied))):
            lost.add(path)
    kept = replace(
        skeleton,
        training={path: mode for path, mode in skeleton.training.items() if path not in lost},
        aliases={
            path: other for path, other in skeleton.aliases.items() if path not in lost and other not in lost
        },
        buffers={name: saved for name, saved in skeleton.buffers.items() if name not in dropped},
        names=tuple(name for name in skeleton.names if name not in dropped),
    )
    return replace(program, modules=modules, tensors=tensors, skeleton=kept)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _within(path: str, modules: set[str]) -> bool:
    """Whether a path is that of one of these modules, or lies within one."""
    while path and path not in modules:
        path = _parent(path)
    return bool(path)


__all__ = ["remove_branches", "unknown", "without_branches"]
