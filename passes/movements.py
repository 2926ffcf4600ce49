"""Picks that a narrowed graph has to make by number, with an inserted ``index_select``.

Five kinds of nodes: a movement whose order cannot be had from the original operator any more (a roll, a
strided slice, a channel shuffle, an index list); a chain of views that amounts to such a movement; a
constant computed in the graph that meets a narrowed axis; a table that several users narrow differently; and
an output that keeps its shape.
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
from ..errors import RewriteError
from ..nn import Fill
from ..nodes import operator_name, writes
from ..program import Program
from .base import Narrowing, Pass, editable

_FLIPS = frozenset(["flip", "fliplr", "flipud"])
_COUNTING = frozenset(["arange", "linspace", "logspace", "eye", "randperm"])


@dataclass(frozen=True)
class SelectMovements(Pass):
    """Replace a movement along a narrowed axis by an ``index_select`` with the surviving map."""

    def requires(self, program: Program, narrowing: Narrowing) -> Sequence[Any]:
        return [node.name for node in program.graph.nodes if _moves(node, narrowing)]

    def run(self, program: Program, narrowing: Narrowing, sites: Sequence[Any]) -> Program:
        graph, nodes = editable(program, narrowing)
        had_users = {node.name for node in graph.nodes if node.users}
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
    """Narrow a constant computed in the graph (arange) right where it is made, if all who use it go together.

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
        graph, nodes = editable(program, narrowing)
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


@dataclass(frozen=True)
class PickFromTables(Pass):
    """Pick from a table (see :mod:`fxprune.coupling.tables`) what goes with the other operands of a node.

    Where the rows of these (heads) keep other columns each, the table gets the rows, too, by
    ``take_along_dim``.
    """

    def requires(self, program: Program, narrowing: Narrowing) -> Sequence[Any]:
        return [
            (user.name, table.name, picks)
            for user, used in narrowing.graph.run.coupler.tables.items()
            for table in dict.fromkeys(used)
            if (picks := _picks(narrowing, user, table))
        ]

    def run(self, program: Program, narrowing: Narrowing, sites: Sequence[Any]) -> Program:
        graph, nodes = editable(program, narrowing)
        extras = dict(program.extras)
        shared: dict[Any, str] = {}
        for user, table, picks in sites:
            last = nodes[table]
            with graph.inserting_before(nodes[user]):
                for pick in picks:
                    last, before = _picked_before(last, pick.dim, program, narrowing)
                    key = (*pick.key, None if before is None else before.tobytes())
                    if key in shared:  # as for queries, which meet a cosine and a sine
                        index = graph.get_attr(shared[key])
                    else:
                        positions = pick.index if before is None else before[pick.index]
                        index = _constant(graph, extras, f"{user}_kept", positions, program)
                        shared[key] = str(index.target)
                    for _ in range(pick.unsqueeze):
                        last = graph.call_method("unsqueeze", (last, 0))
                    if pick.index.ndim == 1:
                        last = graph.call_function(torch.index_select, (last, pick.dim, index))
                    else:
                        last = graph.call_function(torch.take_along_dim, (last, index, pick.dim))
            nodes[user].replace_input_with(nodes[table], last)
            if not nodes[table].users:
                graph.erase_node(nodes[table])
        return replace(program, graph=graph, extras=extras)


@dataclass(frozen=True)
class _Pick:
    """What survives of a table along one dimension.

    Attributes:
        dim: the dimension, counted from the last, which is -1.
        index: ``(n,)``, or as many dimensions as the table, where rows differ.
        unsqueeze: how many dimensions the table lacks for that.
        key: the same for picks that always agree.
    """

    dim: int
    index: np.ndarray[Any, Any]
    unsqueeze: int
    key: Any


def _picks(narrowing: Narrowing, user: fx.Node, table: fx.Node) -> list[_Pick]:
    """How a table becomes as narrow as what it meets; first along dimensions that have no rows."""
    out, value = narrowing.value(user), narrowing.value(table)
    if out is None or value is None:
        return []
    picks = []
    for dim in range(-len(value.shape), 0):
        label = out.label(dim + len(out.shape))
        if label is None or value.shape[dim] == 1 or not narrowing.narrows(label):
            continue
        alive = narrowing.along(out, dim + len(out.shape))
        if alive.all() or not narrowing.along(value, dim + len(value.shape)).all():
            continue
        counts = alive.sum(axis=-1)
        if not counts.size or (counts != counts.flat[0]).any():
            continue  # no rectangle; the shapes will tell
        index = np.nonzero(alive)[-1].reshape(*counts.shape, int(counts.flat[0]))
        flat = index.reshape(-1, index.shape[-1])
        missing = 0
        if (flat == flat[0]).all():
            index = flat[0]
        else:
            rank = max(len(value.shape), len(out.shape) - min(label.over))
            missing = rank - len(value.shape)
            shape = [1] * rank
            for row in (*label.over, dim):
                shape[row - (row >= 0) * len(out.shape)] = narrowing.size(out, row)
            index = index.transpose(np.argsort([*label.over, dim + len(out.shape)])).reshape(shape)
        along = [label, *(rows for row in label.over if (rows := out.label(row)) is not None)]
        key = (*(narrowing.graph.classes(own.ids).tobytes() for own in along), index.shape)
        picks.append(_Pick(dim, index, missing, key))
    return sorted(picks, key=lambda pick: pick.index.ndim)


def _picked_before(
    node: fx.Node, dim: int, program: Program, narrowing: Narrowing
) -> tuple[fx.Node, np.ndarray[Any, Any] | None]:
    """What a node picks from by a known index along ``dim < 0``, and the index; else the node itself."""
    value = narrowing.value(node)
    if value is None or node.target is not torch.index_select or len(node.args) != 3:
        return node, None
    source, at, index = node.args
    tensors = {**program.tensors, **program.extras}
    known = tensors.get(str(index.target)) if isinstance(index, fx.Node) else None
    same = isinstance(at, int) and at % len(value.shape) == dim + len(value.shape)
    if not isinstance(source, fx.Node) or not same or known is None or known.device.type == "meta":
        return node, None
    return source, known.cpu().numpy()


@dataclass(frozen=True)
class FillOutputs(Pass):
    """Put zeros where entries were removed from outputs that keep their shape (:class:`fxprune.nn.Fill`)."""

    def requires(self, program: Program, narrowing: Narrowing) -> Sequence[Any]:
        return [
            node.name
            for node in narrowing.graph.captured.program.graph.nodes
            if node.op == "call_module"
            and isinstance(program.modules[str(node.target)], Fill)
            and narrowing.changed(node.args[0])
        ]

    def run(self, program: Program, narrowing: Narrowing, sites: Sequence[Any]) -> Program:
        graph, nodes = editable(program, narrowing)
        captured = narrowing.graph.captured.program
        originals = {node.name: node for node in captured.graph.nodes}
        tensors = {**captured.tensors, **captured.extras}
        extras, modules = dict(program.extras), dict(program.modules)
        for name in sites:
            node, value = nodes[name], narrowing.value(originals[name].args[0])
            fill = modules[str(node.target)]
            assert value is not None
            assert isinstance(fill, Fill)
            places = dict(zip(fill.dims, node.args[1:], strict=True))
            for dim in range(len(value.shape)):
                label = value.label(dim)
                if label is None or not narrowing.narrows(label):
                    continue
                stands = np.append(narrowing.row(label), False)
                rank = np.where(stands, np.cumsum(stands) - 1, stands.sum())
                before: Any = places.get(dim)
                index = rank[:-1] if before is None else rank[_known(tensors[before.target], name)]
                with graph.inserting_before(node):
                    places[dim] = _constant(graph, extras, f"{name}_places_{dim}", index, program)
            node.args = (node.args[0], *places.values())
            modules[str(node.target)] = Fill(tuple(places)).train(fill.training)
        return replace(program, graph=graph, extras=extras, modules=modules)


def _known(places: torch.Tensor, name: str) -> np.ndarray[Any, Any]:
    """The numbers in ``places``, which no check on shapes could tell from others."""
    if places.is_meta:
        raise RewriteError(
            f"{name} fills an output by numbers that went when the network was moved to the meta device. "
            f"Next: prune it where its values are, or prune the original once."
        )
    numbers: np.ndarray[Any, Any] = places.cpu().numpy()
    return numbers


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
