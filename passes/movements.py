"""Picks that a narrowed graph has to make by number, with an inserted ``index_select``.

Three kinds of nodes: a movement whose order cannot be had from the original operator any more (a roll, a
strided slice, a channel shuffle, an index list); a chain of views that amounts to such a movement; and a
constant computed in the graph that meets a narrowed axis.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from ..coupling.units import Take, Value
from ..program import Program, writes
from .base import Narrowing, Pass, copy_graph, operator_name

_FLIPS = frozenset(["flip", "fliplr", "flipud"])
_COUNTING = frozenset(["arange", "linspace", "logspace", "eye", "randperm"])


@dataclass(frozen=True)
class SelectMovements(Pass):
    """Replace a movement along a narrowed axis by an ``index_select`` with the surviving map."""

    def requires(self, program: Program, narrowing: Narrowing) -> Sequence[Any]:
        return [node.name for node in program.graph.nodes if _moves(node, narrowing)]

    def run(self, program: Program, narrowing: Narrowing, sites: Sequence[Any]) -> Program:
        graph, nodes = copy_graph(program.graph)
        extras = dict(program.extras)
        for name in sites:
            node = nodes[name]
            found = narrowing.take(node)
            if found is None:
                continue
            origin, take = found
            index = _surviving(narrowing, take)
            with graph.inserting_before(node):
                where = _constant(graph, extras, f"{name}_index", index, program)
                rest = _rest(node, take.dim, len(take.value.shape))
                pick = (nodes[origin], take.dim, where)
                if rest is None:
                    node.op, node.target, node.args, node.kwargs = (
                        "call_function",
                        torch.index_select,
                        pick,
                        {},
                    )
                else:
                    node.args, node.kwargs = (graph.call_function(torch.index_select, pick), *rest), {}
                node.meta.pop("is_wrapped", None)
        had_users = {node.name for node in program.graph.nodes if node.users}
        for node in reversed(list(graph.nodes)):  # the movements that the picks replace
            calls = node.op in ("call_method", "call_function") and not writes(node)
            if calls and not node.users and node.name in had_users:
                graph.erase_node(node)
        return replace(program, graph=graph, extras=extras)


def _moves(node: fx.Node, narrowing: Narrowing) -> bool:
    found = narrowing.take(node)
    if found is None or operator_name(node) in _FLIPS:
        return False
    _, take = found
    label = take.value.label(take.dim)
    return label is not None and not label.over and narrowing.narrows(label)


def _rest(node: fx.Node, dim: int, rank: int) -> tuple[Any, ...] | None:
    """Arguments for what a movement does along the other dimensions, if it does anything."""
    if operator_name(node) == "roll":
        shifts: Any
        dims: Any
        shifts, dims = (
            node.args[i] if len(node.args) > i else node.kwargs[name]
            for i, name in ((1, "shifts"), (2, "dims"))
        )
        if isinstance(dims, int):
            return None
        others = [(s, d) for s, d in zip(shifts, dims, strict=True) if d % rank != dim]
        return tuple(zip(*others, strict=True)) or None
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return None
    items = list(node.args[1])
    if Ellipsis in [item for item in items if not isinstance(item, fx.Node)]:
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        used = sum(item is not None for item in items) - 1
        items[at : at + 1] = [slice(None)] * (rank - used)
    place = -1
    for i, item in enumerate(items):
        place += item is not None
        if place == dim:
            items[i] = slice(None)
            break
    plain = all(isinstance(item, slice) and item == slice(None) for item in items)
    return None if plain else (tuple(items),)


def _surviving(narrowing: Narrowing, take: Take) -> np.ndarray[Any, Any]:
    """The positions picked, counted among the survivors."""
    label = take.value.label(take.dim)
    assert label is not None
    mask = narrowing.row(label)
    rank = np.cumsum(mask) - 1
    picked: np.ndarray[Any, Any] = rank[take.index[mask[take.index]]]
    return picked


@dataclass(frozen=True)
class NarrowConstants(Pass):
    """Narrow a constant computed in the graph (arange, rotary table) right where it is made.

    Constants whose entries are all alike are narrowed by their size (see
    :class:`~fxprune.passes.literals.RewriteLiterals`).
    """

    def requires(self, program: Program, narrowing: Narrowing) -> Sequence[Any]:
        return [
            node.name
            for node in program.graph.nodes
            if _is_constant(narrowing.value(node), node)
            and operator_name(node) in _COUNTING
            and narrowing.changed(node)
        ]

    def run(self, program: Program, narrowing: Narrowing, sites: Sequence[Any]) -> Program:
        graph, nodes = copy_graph(program.graph)
        extras = dict(program.extras)
        for name in sites:
            node = nodes[name]
            value = narrowing.value(node)
            assert value is not None
            last, users = node, list(node.users)
            for dim in range(len(value.shape)):
                label = value.label(dim)
                if label is None or not narrowing.narrows(label):
                    continue
                index = np.flatnonzero(narrowing.row(label))
                with graph.inserting_after(last):
                    where = _constant(graph, extras, f"{name}_kept_{dim}", index, program)
                with graph.inserting_after(where):
                    last = graph.call_function(torch.index_select, (last, dim, where))
            for user in users:
                user.replace_input_with(node, last)
        return replace(program, graph=graph, extras=extras)


def _is_constant(value: Value | None, node: fx.Node) -> bool:
    return (
        value is not None
        and value.state is not None
        and value.state.tensor is None
        and value.state.name == node.name
    )


def _constant(
    graph: fx.Graph, extras: dict[str, torch.Tensor], name: str, index: Any, program: Program
) -> fx.Node:
    """A node that reads ``index`` from a new buffer outside of the state dict."""
    name = f"_{name}"
    while name in extras or name in program.tensors:
        name += "_"
    device = next(
        (t.device for t in program.tensors.values() if t.device.type != "meta"), torch.device("cpu")
    )
    extras[name] = torch.from_numpy(np.ascontiguousarray(index)).to(device)
    return graph.get_attr(name)
