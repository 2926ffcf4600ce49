"""The vocabulary in which operator rules speak: unify, take, reshape, freeze.

A rule never touches the union-find; it says what an operator does to dimensions in these few words. All
index algebra is done by numpy on arrays of unit numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from .roles import Factor, Uses, factor
from .units import (
    FIXED,
    NONE,
    Axis,
    Event,
    Ids,
    Label,
    Open,
    Parent,
    Product,
    Rectangle,
    State,
    TableUse,
    Take,
    Units,
    Value,
    aligned,
)

ZeroRule = Callable[[list[bool]], bool]
"""From "operand i is zero at removed indices" to "the result is"."""


_Use = tuple[int, Value, int, Sequence[Any], Label | None]
"""One dimension that carries an index name: operand number, value, dimension, its names, its label."""


_MOST = 1 << 20
"""Cells of one product; a larger one is not followed."""


class Coupler:
    """The state of one analysis, and the operations that rules are made of."""

    def __init__(self, units: Units | None = None) -> None:
        self.units = units or Units()
        self.node: fx.Node | None = None
        self.operator = ""
        self.remedy = ""  # for what has to stay where the current node computes a weight
        self.strides: tuple[int, ...] = ()
        """Strides that the first argument had before an in-place operator changed them."""
        self.edges: list[tuple[Axis, Axis, fx.Node | None]] = []
        self.rectangles: list[Rectangle] = []
        self.frozen: list[Event] = []
        self.inexact: list[Event] = []
        self.multiples: list[tuple[Ids, int]] = []
        self.collisions: list[fx.Node | None] = []
        self.by_size: set[fx.Node] = set()
        """Nodes whose effect on labelled dimensions depends on sizes or positions."""
        self.takes: dict[fx.Node, Take | None] = {}
        """Nodes that pick indices other than by a plain slice; None where one node picks twice."""
        self.picked: dict[fx.Node, list[tuple[Label, int]]] = {}
        """What nodes pick one index of, and which: what they put out has no label that would tell it."""
        self.table_uses: dict[fx.Node, list[TableUse]] = {}
        """Tables that were met, by node; decided on when the whole graph is known."""
        self.tables: dict[fx.Node, list[fx.Node]] = {}
        """Nodes that pick from a table what goes with their other operands, and the nodes that make it."""
        self.by_row: list[Event] = []
        """Columns that stay, so that only whole rows of them can go, and why."""
        self.whole: Ids = np.empty(0, dtype=np.int64)
        """Units of tables that are not narrowed themselves."""
        self.uses = Uses()
        """Which products use which axes of parameters."""
        self._given: Any = ()
        self._origin: Parent | tuple[Sequence[Factor], Sequence[Any]] | None = None
        """What the next result is computed from: a value, or operands with index names and its own names."""

    def begin(self, operator: str, given: Any = ()) -> None:
        """Say which ATen operator the rule that comes next is for, and what it is given."""
        self.operator = operator
        self._given = given
        self._origin = None

    def depends_on_sizes(self) -> None:
        """Say that the current node treats labelled dimensions by size or position.

        All other nodes do to narrowed arguments what they did to the original ones, by the nature of
        their rules; these have to be looked at again once the graph is rewritten.
        """
        if self.node is not None:
            self.by_size.add(self.node)

    # -- values ---------------------------------------------------------------------------------

    def value(self, tensor: torch.Tensor) -> Value:
        """What is known of ``tensor``; a tensor never seen before has no labels."""
        value = getattr(tensor, "_fxprune_value", None)
        if value is None:
            value = Value(tuple(tensor.shape), [None] * tensor.dim(), dtype=tensor.dtype)
            tensor._fxprune_value = value  # type: ignore[attr-defined]
        elif value.on_use:
            for events, event in value.on_use:
                events.append(event)
            value.on_use = ()
        return value

    def peek(self, tensor: torch.Tensor) -> Value:
        """:meth:`value` for a look that is no use."""
        value: Value | None = getattr(tensor, "_fxprune_value", None)
        return self.value(tensor) if value is None else value

    def put(self, tensor: torch.Tensor, labels: Iterable[Label | None]) -> None:
        """Record the labels of an operator's result."""
        self._put(tensor, labels, False)

    def _put(self, tensor: torch.Tensor, labels: Iterable[Label | None], moved: bool) -> None:
        labels = [
            _over_rows(label, tensor.shape) if label is not None and self._counts(label) else None
            for label in labels
        ]
        value = getattr(tensor, "_fxprune_value", None)
        if value is not None and value.state is None:  # an in-place operator returned its input
            value.labels = labels
        elif value is None:
            value = Value(tuple(tensor.shape), labels, dtype=tensor.dtype)
            tensor._fxprune_value = value  # type: ignore[attr-defined]
        if value.state is None:
            self._descend(value, moved)
        for dim, label in enumerate(labels):
            if isinstance(label, Open):
                label.holders.append((value, dim))

    @staticmethod
    def _counts(label: Label) -> bool:
        """Whether it says anything: of one index there is nothing to remove."""
        return bool(label.holders) if isinstance(label, Open) else label.ids.shape[-1] > 1

    def _descend(self, value: Value, moved: bool) -> None:
        """Remember what a result was computed from: if it was moved, or if it is a weight."""
        origin = self._origin
        value.parents, value.derived = (), False
        if isinstance(origin, Parent):
            if origin.value is not value:
                value.parents, value.derived = (origin,), origin.value.fixed
        elif origin is not None:
            operands, result = origin
            value.derived = (
                bool(operands)
                and all(operand.fixed for operand, _ in operands)
                and all(
                    self.peek(tensor).fixed
                    for tensor in tree_leaves(self._given)
                    if isinstance(tensor, torch.Tensor)
                )
            )
            if (value.derived or moved) and len(result) == len(value.shape):
                named = [(operand, list(names)) for operand, names in operands if operand is not value]
                value.parents = [
                    Parent(operand, [names.index(n) if n in names else -1 for n in result], same=moved)
                    for operand, names in named
                ]

    def put_view(self, tensor: torch.Tensor, source: Value, labels: Iterable[Label | None]) -> None:
        """As :meth:`put`, for a result that shares memory with ``source``."""
        self._put(tensor, labels, True)
        self.value(tensor).storage = source.storage

    def alias(self, tensor: torch.Tensor, value: Value) -> None:
        """Record that ``tensor`` is the very value, memory included."""
        tensor._fxprune_value = value  # type: ignore[attr-defined]

    def constant(self, tensor: torch.Tensor) -> None:
        """Record a constant made in the graph, whose axes are free to follow what they meet."""
        name = self.node.name if self.node is not None else "constant"
        shape = tuple(tensor.shape)
        state = State(name, shape, None, [None] * len(shape), self.node)
        value = Value(shape, [], state, tuple(range(len(shape))), tensor.dtype)
        tensor._fxprune_value = value  # type: ignore[attr-defined]

    def materialize(self, value: Value) -> None:
        """Give every open dimension units of its own."""
        for dim in range(len(value.shape)):
            if value.is_open(dim):
                self.own(value, dim)

    def own(self, value: Value, dim: int) -> Label:
        """Label an open axis with units of its own."""
        of_table = value.state is not None and not value.state.trainable
        return self.adopt(value, dim, self.units.fresh(value.shape[dim], of_table=of_table), ())

    def adopt(
        self, value: Value, dim: int, ids: Ids, over: tuple[int, ...], axis: Axis | None = None
    ) -> Label:
        """Label an open axis with ``ids``; ``over`` are dimensions of ``value``."""
        state = value.state
        if state is None:
            label = Label(ids, over, axis or self.here(dim))
            met = value.labels[dim]
            holders = met.close() if isinstance(met, Open) else []
            if len(holders) > 1 and over:  # dimensions of this value, which others may not have
                label = self.tie(label, over)
            for other, place in (*holders, (value, dim)):
                other.labels[place] = label
            return label
        if state.tensor is None and state.node is not None:
            self.by_size.add(state.node)
        own = Axis(state.name, value.dims[dim])
        label = Label(ids, tuple(value.dims[d] for d in over), own, zero=state.trainable)
        state.axes[value.dims[dim]] = label
        if state.trainable:
            self.units.unmark_tables(ids)
        for event in state.kept.get(value.dims[dim], ()):
            self._freeze(label, event)
        if axis is not None:
            self.edges.append((axis, own, self.node))
        return label

    # -- units ----------------------------------------------------------------------------------

    def merge(self, a: Ids, b: Ids, a_axis: Axis, b_axis: Axis, reason: str = "") -> None:
        """Make units live and die together."""
        if a is b:
            return
        met, collided = self.units.merge(a, b)
        if collided:
            self.collisions.append(self.node)
        if met.size:
            reason = reason or f"meets an axis that cannot be narrowed ({a_axis} with {b_axis})"
            self.frozen.append(Event(met, a_axis, self.node, reason))
        if a_axis != b_axis:
            self.edges.append((a_axis, b_axis, self.node))

    def tie(self, label: Label, dims: Sequence[int]) -> Label:
        """Make ``label`` independent of ``dims``: each column is removed in all rows or in none."""
        ids, over = label.ids, list(label.over)
        for dim in dims:
            if dim in over:
                at = over.index(dim)
                first = ids.take([0], axis=at)
                self.merge(first, ids, label.axis, label.axis)
                ids = first.squeeze(at)
                del over[at]
        return Label(ids, tuple(over), label.axis, label.zero, label.row)

    def freeze(self, label: Label, reason: str, remedy: str = "") -> None:
        """The dimension keeps its extent: no index goes, or only whole rows where the label has rows."""
        self._freeze(label, Event(label.ids, label.axis, self.node, reason, remedy))

    def _freeze(self, label: Label, event: Event) -> None:
        if label.over:
            self.merge(label.ids[..., :1], label.ids, label.axis, label.axis)
        (self.by_row if label.over else self.frozen).append(replace(event, ids=label.ids))

    def freeze_dim(self, value: Value, dim: int, reason: str, remedy: str = "") -> None:
        """Freeze whatever labels dimension ``dim``, or will."""
        if value.shape[dim] == 1:
            return
        if value.is_open(dim):
            met = value.labels[dim] if value.state is None else None
            if isinstance(met, Open):
                met.close()
            elif value.state is not None:
                place = value.dims[dim]
                event = Event(NONE, Axis(value.state.name, place), self.node, reason, remedy)
                value.state.kept.setdefault(place, []).append(event)
            return
        label = value.label(dim)
        if label is not None:
            self.freeze(label, reason, remedy)

    def keep_units(self, ids: Ids, axis: Axis, reason: str) -> None:
        """Say that some of the units of a label stay, each by itself."""
        self.frozen.append(Event(ids, axis, self.node, reason))

    def keep(self, value: Value, dim: int, reason: str) -> None:
        """Keep all indices of a dimension, also in rows that go as a whole."""
        if value.is_open(dim):
            self.own(value, dim)
        label = value.label(dim)
        if label is not None:
            self.keep_units(label.ids, label.axis, reason)

    def freeze_value(self, value: Value, reason: str, remedy: str = "") -> None:
        for dim in range(len(value.shape)):
            self.freeze_dim(value, dim, reason, remedy)

    def mark_inexact(self, label: Label, reason: str) -> None:
        if isinstance(label, Open):
            label.close()
            return
        self.inexact.append(Event(label.ids, label.axis, self.node, reason))

    def keep_multiple(self, label: Label, number: int) -> None:
        """Have the number of units that are left of a label be a multiple: an operator takes no others."""
        if not isinstance(label, Open):
            self.multiples.append((label.ids, number))

    def once_used(
        self, tensor: torch.Tensor, kept: Sequence[tuple[Label, str]], inexact: Sequence[tuple[Label, str]]
    ) -> None:
        """Say what a result costs as soon as an operator reads it: labels that stay or are inexact."""
        events = [(self.frozen, *each) for each in kept] + [(self.inexact, *each) for each in inexact]
        if events:
            self.peek(tensor).on_use = [
                (found, Event(label.ids, label.axis, self.node, reason)) for found, label, reason in events
            ]

    def written(self, value: Value) -> None:
        """Say that something was written into a value that is not zero where the masked original is."""
        value.storage[0] = True

    def rectangle(self, rows: Ids, cells: Ids) -> None:
        """Require equally many cells in every row; leading dimensions of both are rows."""
        self.depends_on_sizes()
        flat = cells.reshape(-1, cells.shape[-1])
        if flat.shape[0] > 1:
            self.units.mark_rows(rows.reshape(-1))
            self.rectangles.append(Rectangle(rows.reshape(-1), flat, self.node))

    # -- products of rows and columns -----------------------------------------------------------

    def multiply(self, cells: Ids, rows: Ids, columns: Ids, axis: Axis) -> None:
        """Say that each of these cells goes as soon as its row or its column does (arrays broadcast)."""
        rows, columns = np.broadcast_to(rows, cells.shape), np.broadcast_to(columns, cells.shape)
        self.units.multiply(Product(cells, rows, columns, axis, self.node))

    def is_one_cell(self, size: int) -> bool:
        """Whether a row of ``size`` cells has only ever had one, which then goes with its row."""
        return size == 1

    def picks_from_table(self, index: Value, value: Value, dim: int) -> bool:
        """Whether ``index`` is a buffer that picks from a table, and so narrows with what it picks."""
        return index.state is not None and not index.state.trainable and self.is_table(value, dim)

    def is_row(self, label: Label | None) -> bool:
        """Whether the units of a label stand for rows of rectangles, with which their cells go."""
        return label is not None and self.units.are_rows(label.ids)

    # -- operands that meet: pointwise operators, contractions, normalisations ------------------

    def unify(
        self,
        operands: Sequence[tuple[Value, Sequence[Any]]],
        out: Sequence[Any],
        zero: ZeroRule = all,
        apart: Collection[int] = (),
    ) -> tuple[list[Label | None], dict[Any, tuple[Label, bool]]]:
        """Couple dimensions that carry the same index name, as in an einsum.

        Args:
            operands: values with an index name for each dimension. Dimensions of size 1 broadcast.
            out: index names of the result.
            zero: how zeros at removed indices carry over.
            apart: numbers of operands that are only noted where they are tables (see :mod:`.tables`).

        Returns:
            Labels of the result (``over`` its dimensions), and for every labelled index name that is not
            in ``out`` its label and whether some operand is zero at removed indices.
        """
        self._origin = operands, out
        uses: dict[Any, list[_Use]] = {}
        plain, opened = set(), set()
        for place, (value, names) in enumerate(operands):
            shape = value.shape
            for dim, name in enumerate(names):
                if shape[dim] == 1:
                    continue
                label = value.label(dim)
                if label is None:
                    if not value.is_open(dim):
                        plain.add(name)
                        continue
                    opened.add(name)
                uses.setdefault(name, []).append((place, value, dim, names, label))
        result: dict[Any, tuple[Ids, tuple[Any, ...], Axis, bool, list[bool]]] = {}
        position = {name: dim for dim, name in enumerate(out)}
        still_open: dict[Any, Open] = {}
        for name, used in uses.items():
            if name in opened:  # what is open may have met another name's label
                used = [(*use[:4], use[1].label(use[2])) for use in used]
                if any(use[4] is None and not use[1].is_open(use[2]) for use in used):
                    plain.add(name)
            met = self._meet(used, name in plain, apart)
            if isinstance(met, Open):
                if name in position:
                    still_open[name] = met
                else:
                    met.close()
            elif met is not None:
                zeros = [False] * len(operands)
                for place, value, dim, _, _ in used:
                    if not zeros[place]:
                        zeros[place] = value.is_zero(dim)
                result[name] = (*met, zeros)
        labels: list[Label | None] = []
        for name in out:
            if name not in result:
                labels.append(still_open.get(name))
                continue
            ids, over, axis, row, zeros = result[name]
            if over:
                lost = [o for o in over if o not in position]
                if lost:
                    ids, over = self._drop(ids, over, lost, axis, uses[name])
                over = tuple(position[o] for o in over)
            labels.append(Label(ids, over, axis, zero(zeros), row))
        gone = {}
        for name, (ids, _, axis, row, zeros) in result.items():
            if name not in position:
                gone[name] = (Label(ids, (), axis, False, row), any(zeros))
        return labels, gone

    def _meet(self, used: list[_Use], plain: bool, apart: Collection[int]) -> Any:
        """Couple the uses of one index name: ``(units, index names they are over, axis, row)``.

        The :class:`Open` that they share where all uses are still open, None where the units stay because
        the name is also that of a ``plain`` dimension, one without labels.
        """
        if plain:
            reason = "meets an axis of the inputs, or one that an operator made unprunable"
            for _, value, dim, _, _ in used:
                self.freeze_dim(value, dim, reason)
            return None
        labelled = [use for use in used if use[4] is not None]
        tables: list[_Use] = []
        if apart and labelled and len(used) > 1:
            tables = [use for use in used if use[0] in apart and self.is_table(use[1], use[2])]
            met = [use for use in labelled if tables and not self.is_table(use[1], use[2])]
            tables = tables if met else []
            if tables:
                used, labelled = [use for use in used if use not in tables], met
        if not labelled:
            first_state = next((use for use in used if use[1].state is not None), None)
            if first_state is None:
                first_open, *more = (value.labels[dim] for _, value, dim, _, _ in used)
                assert isinstance(first_open, Open)
                for another in more:
                    assert isinstance(another, Open)
                    first_open.join(another)
                return first_open
            place, value, dim, names, _ = first_state
            states = [use[1].state for use in used if use[1].state is not None]
            of_table = not any(state.trainable for state in states)
            adopted = self.adopt(value, dim, self.units.fresh(value.shape[dim], of_table=of_table), ())
            labelled = [(place, value, dim, names, adopted)]
        if len(labelled) > 1:
            labelled.sort(key=lambda use: len(use[4].over) if use[4] is not None else 0)
        _, _, _, names, first = labelled[0]
        assert first is not None
        ids, axis, row = first.ids, first.axis, first.row
        over = tuple([names[d] for d in first.over])
        for _, _, _, names, label in labelled[1:]:
            assert label is not None
            over_other = tuple([names[d] for d in label.over])
            if ids is not label.ids or over != over_other:
                # Rows that the other side does not have meet all of its rows, so they are tied.
                other = label.ids
                lost = [o for o in over if o not in over_other]
                if lost:
                    ids, over = self._drop(ids, over, lost, axis, used)
                lost = [o for o in over_other if o not in over]
                if lost:
                    other, over_other = self._drop(other, over_other, lost, label.axis, used)
                self.merge(aligned(ids, over, over), aligned(other, over_other, over), axis, label.axis)
            row = row and label.row
        for _, value, dim, names, label in used:
            if label is None and value.is_open(dim):
                if over:
                    lost = [o for o in over if o not in names or value.shape[list(names).index(o)] == 1]
                    if lost:
                        ids, over = self._drop(ids, over, lost, axis, used)
                self.adopt(value, dim, ids, tuple(list(names).index(o) for o in over), axis)
        for use in tables:
            self._note(use, ids, over, axis)
        return ids, over, axis, row

    def is_table(self, value: Value, dim: int) -> bool:
        """Whether a dimension belongs to a buffer or constant, or to what is computed from such."""
        if value.state is None and not self.units.any_tables:
            return False
        label = value.label(dim)
        if label is None:
            return value.state is not None and not value.state.trainable and value.is_open(dim)
        return self.units.are_tables(label.ids)

    def _note(self, use: _Use, ids: Ids, over: tuple[Any, ...], axis: Axis) -> None:
        """Remember that a table met units ``ids``, ``over`` these index names."""
        _, table, dim, names, label = use
        if label is None:
            rows = tuple(o for o in over if o in names and table.shape[list(names).index(o)] > 1)
            sizes = [table.shape[list(names).index(o)] for o in rows]
            own = self.units.fresh(*sizes, table.shape[dim], of_table=True)
            label = self.adopt(table, dim, own, tuple(list(names).index(o) for o in rows))
            label = table.label(dim) or label
        over_own = tuple(names[d] for d in label.over)
        both = (*over, *(o for o in over_own if o not in over))
        units, met = aligned(label.ids, over_own, both), aligned(ids, over, both)
        if self.node is not None:
            noted = self.table_uses.setdefault(self.node, [])
            noted.append(TableUse(table, units, met, label.axis, axis))

    def _drop(
        self, ids: Ids, over: tuple[Any, ...], lost: Sequence[Any], axis: Axis, used: Sequence[_Use]
    ) -> tuple[Ids, tuple[Any, ...]]:
        """:meth:`tie` for a label whose rows go by index names, of which some are ``lost``.

        Where these are rows that can go, a column goes from all of them or from none, but each row can go.
        """
        left = tuple(o for o in over if o not in lost)
        gone = [i for i, o in enumerate(over) if o in lost]
        columns = self._columns(ids, self._rows_over(used, over, lost), gone, axis)
        if columns is not None:
            return columns.squeeze(tuple(gone)), left
        tied = self.tie(Label(ids, tuple(range(len(over))), axis), gone)
        return tied.ids, left

    def _columns(self, ids: Ids, rows: Ids | None, gone: Sequence[int], axis: Axis) -> Ids | None:
        """The columns of cells, of size 1 along the dimensions ``gone`` of their rows; None without rows."""
        if rows is None:
            return None
        known = self.units.factors(ids)
        if known is not None:
            self.merge(known[0], np.broadcast_to(rows, ids.shape), axis, axis)
            return self._joined(known[1], gone, axis)
        sizes = [1 if i in gone else size for i, size in enumerate(ids.shape)]
        columns = self.units.fresh(*sizes, of_table=self.units.are_tables(ids))
        self.multiply(ids, rows, columns, axis)
        return columns

    def _joined(self, columns: Ids, gone: Sequence[int], axis: Axis) -> Ids:
        """Columns that are one along the dimensions ``gone``, of size 1 there."""
        first = columns[tuple(slice(0, 1) if i in gone else slice(None) for i in range(columns.ndim))]
        self.merge(first, columns, axis, axis)
        return first

    def _rows_over(self, used: Sequence[_Use], over: tuple[Any, ...], lost: Sequence[Any]) -> Ids | None:
        """The units of the rows that go by the index names ``lost``, to broadcast against their cells."""
        inner = [o for o in over if o in lost][-1]
        for _, value, _, names, _ in used:
            if inner not in names:
                continue
            dim = list(names).index(inner)
            label = value.label(dim) if value.shape[dim] > 1 else None
            if label is None or not self.is_row(label):
                continue
            outer = tuple(names[d] for d in label.over)
            if set(outer) <= set(over) and set(lost) <= {*outer, inner}:
                return aligned(label.ids[..., None], (*outer, inner), over)
        return None

    # -- moving: views, permutations, slices ----------------------------------------------------

    def permute(self, out: torch.Tensor, value: Value, order: Sequence[int]) -> None:
        """Dimension ``i`` of the result is dimension ``order[i]`` of ``value``; -1 is a new one of size 1."""
        if getattr(out, "_fxprune_value", None) is value and list(order) != list(range(len(value.shape))):
            del out._fxprune_value  # type: ignore[attr-defined]  # permuted in place
        if value.state is not None and -1 not in order and len(order) == len(value.shape):
            dims = tuple(value.dims[d] for d in order)
            moved = Value(tuple(out.shape), [], value.state, dims, value.dtype, value.storage)
            moved.parents = (Parent(value, order),)
            out._fxprune_value = moved  # type: ignore[attr-defined]
            return
        if value.state is not None:
            self.materialize(value)
        place = {old: new for new, old in enumerate(order)}
        labels: list[Label | None] = []
        for old in order:
            label = value.label(old) if old >= 0 else None
            if label is not None:
                over = tuple(place[o] for o in label.over)
                label = Label(label.ids, over, label.axis, label.zero, label.row)
            elif old >= 0 and value.state is None:
                label = value.labels[old]
            labels.append(label)
        self._origin = Parent(value, order)
        self.put_view(out, value, labels)

    def product(self, factors: Sequence[Factor], result: Sequence[Any]) -> None:
        """Say that the current operator multiplies, and sums over the index names not in ``result``.

        Of weights among the factors, the axes that are summed over *consume* channels, those that only the
        weight has *produce* them.
        """
        self.uses.product(self.node, self.operator, factors, result)

    def produces(self, weight: Value, dim: int) -> None:
        """Say that the current operator makes the channels of its result from this axis of a weight."""
        self.uses.note("produces", self.node, self.operator, weight, dim)

    def consumes(self, weight: Value, dim: int, x: Value, x_dim: int) -> None:
        """Say that the current operator reads the channels of ``x``, by this axis of a weight."""
        self.uses.note("consumes", self.node, self.operator, weight, dim, (x, x_dim))

    def open(self, tensor: torch.Tensor, dim: int) -> None:
        """Say that along ``dim`` all entries of a result are alike: it may follow what it meets."""
        value = self.value(tensor)
        value.labels[dim] = Open(holders=[(value, dim)])

    def take(self, value: Value, dim: int, index: Ids) -> list[Label | None]:
        """Labels after picking indices ``index`` along ``dim`` (slice, flip, roll, tile, index_select)."""
        block = bool(index.size) and bool((np.diff(index) == 1).all())
        part = (dim, int(index[0]), int(index[-1]) + 1) if block else (dim, -1, -1)
        self._origin = Parent(value, range(len(value.shape)), part)
        if value.state is not None:
            self.materialize(value)
        elif value.is_open(dim):
            self.own(value, dim)
        labels: list[Label | None] = []
        for own in range(len(value.shape)):
            label = value.label(own)
            if label is None and value.is_open(own):
                label = value.labels[own]
                labels.append(label)
                continue
            if label is not None and (own == dim or dim in label.over):
                self.depends_on_sizes()
            if label is not None and own == dim and index.size == 1 and label.ids.shape[-1] > 1:
                self._picked_out(label, int(index[0]))
                label = None
            elif label is not None and own == dim:
                ids = label.ids[..., index]
                if label.over:
                    self.rectangle(self.rows_of(value, label), ids)
                label = self._moved(label, ids, label.over, own)
            elif label is not None and dim in label.over:
                ids = label.ids.take(index, axis=label.over.index(dim))
                label = Label(ids, label.over, label.axis, label.zero, label.row)
            labels.append(label)
        return labels

    def pick(self, value: Value, dim: int, index: Ids) -> list[Label | None]:
        """:meth:`take`, remembered because a rewritten node may have to pick by number."""
        labels = self.take(value, dim, index)
        alone = index.size == 1 and value.label(dim) is not None  # one index has no label
        if self.node is not None and (alone or labels[dim] is not None):
            self.takes[self.node] = None if self.node in self.takes else Take(value, dim, index)
        return labels

    def select(self, value: Value, dim: int, index: int) -> list[Label | None]:
        """Labels after picking one index along ``dim`` and dropping the dimension."""
        left = [d for d in range(len(value.shape)) if d != dim]
        self._origin = Parent(value, left, (dim, index, index + 1))
        if value.state is not None:
            self.materialize(value)
        elif value.is_open(dim):
            self.freeze_dim(value, dim, "selected by its number")
        own = value.label(dim)
        if own is not None or any(
            o is not None and dim in o.over for o in map(value.label, range(len(value.shape)))
        ):
            self.depends_on_sizes()
        if own is not None:
            self._picked_out(own, index)
        labels: list[Label | None] = []
        for d in range(len(value.shape)):
            label = value.label(d)
            if d == dim:
                continue
            if label is not None:
                ids, over = label.ids, list(label.over)
                if dim in over:
                    ids = cast(Ids, ids.take(index, axis=over.index(dim)))  # ids has a further axis
                    over.remove(dim)
                shifted = tuple(o - (o > dim) for o in over)
                label = Label(ids, shifted, label.axis, label.zero, label.row)
            elif value.is_open(d):
                label = value.labels[d]
            labels.append(label)
        return labels

    def _picked_out(self, label: Label, index: int) -> None:
        """One index is picked by its number, so that it has to stay."""
        if label.over:
            self.freeze(label, "one column of a rectangle is selected")
        else:
            ids = label.ids[index : index + 1]
            if self.node is not None:
                self.picked.setdefault(self.node, []).append((label, index))
            self.keep_units(ids, label.axis, "this index is selected by its number")

    def cat(self, values: Sequence[Value], dim: int) -> list[Label | None]:
        """Labels after concatenating along ``dim``; other dimensions are coupled."""
        for value in values:
            if value.is_open(dim):
                self.own(value, dim)
        rank = len(values[0].shape)
        names = [[i if i != dim else ("part", k) for i in range(rank)] for k in range(len(values))]
        others = [i for i in range(rank) if i != dim]
        shared, _ = self.unify(list(zip(values, names, strict=True)), others)
        self._origin = [(value, range(rank)) for value in values], range(rank)
        parts = [value.label(dim) for value in values]
        own: Label | None = None
        if any(part is not None for part in parts):
            over = tuple(sorted({o for part in parts if part is not None for o in part.over}))
            sizes = tuple(max(value.shape[o] for value in values) for o in over)
            pieces = []
            for value, part in zip(values, parts, strict=True):
                ids = np.full(value.shape[dim], FIXED) if part is None else part.ids
                if over:
                    ids = aligned(ids, part.over if part is not None else (), over)
                    ids = np.broadcast_to(ids, (*sizes, value.shape[dim]))
                pieces.append(ids)
            zero = all(v.is_zero(dim) for v, part in zip(values, parts, strict=True) if part is not None)
            axis = self.here(dim)
            own = Label(np.concatenate(pieces, axis=-1), over, axis, zero)
            self.edges += [(part.axis, axis, self.node) for part in parts if part is not None]
        labels: list[Label | None] = []
        for i in range(rank):
            label = own if i == dim else shared[others.index(i)]
            if label is not None and label is not own and not isinstance(label, Open):
                over = tuple(others[o] for o in label.over)
                if dim in over:
                    label = self.tie(Label(label.ids, over, label.axis, label.zero, label.row), [dim])
                else:
                    label = Label(label.ids, over, label.axis, label.zero, label.row)
            labels.append(label)
        return labels

    def reshape(self, value: Value, shape: Sequence[int]) -> list[Label | None]:
        """Labels after a row-major reshape to ``shape``.

        The shapes are factored into groups of dimensions with equal products. Within a group the same
        reshape is run on the units. Where units then differ along several dimensions, the inner ones
        become columns over the outer ones (see :class:`~fxprune.coupling.units.Rectangle`).
        """
        self._origin = Parent(value)
        if value.state is not None:
            self.materialize(value)
        labels: list[Label | None] = [None] * len(shape)
        old = [value.label(d) for d in range(len(value.shape))]
        if not any(label is not None or value.is_open(d) for d, label in enumerate(old)):
            return labels
        groups = factor(value.shape, shape)
        group_of = {d: group for group in groups for d in group[0]}
        for ins, outs in groups:
            spread = [d for d in ins if value.is_open(d)]
            if len(spread) == 1 and len(ins) + len(outs) > 2 and not any(old[d] is not None for d in ins):
                old[spread[0]] = self.own(value, spread[0])
            inside = [d for d in ins if old[d] is not None]
            for d in ins:
                if value.is_open(d) and len(ins) == len(outs) == 1:
                    labels[outs[0]] = value.labels[d]
                elif value.is_open(d):  # only its extent counts from here on
                    self.freeze_dim(value, d, "flattened with others")
            if not inside:
                continue
            if len(ins) > 1 or len(outs) > 1:
                self.depends_on_sizes()
            elif self._kept(labels, old[ins[0]], outs[0]):
                continue
            factors = self._factors(inside, old)
            blocks: list[tuple[list[int], list[int]]] = []
            for o in (o for _, label in factors for o in label.over):
                if group_of[o] not in blocks and group_of[o] != (ins, outs):
                    blocks.append(group_of[o])
            n_outer = len({o for _, o_outs in blocks for o in o_outs})
            blocks.append((ins, outs))
            in_order = [d for block, _ in blocks for d in block]
            label, array = self._flattened(factors, in_order, [value.shape[d] for d in in_order])
            out_order = [d for _, block in blocks for d in block]
            array = array.reshape([shape[d] for d in out_order])
            self._place(labels, label, array, out_order, n_outer)
        return labels

    def _kept(self, labels: list[Label | None], label: Label | None, dim: int) -> bool:
        """Pass on the label of a dimension that a reshape leaves alone; False if that is not enough."""
        assert label is not None
        if label.over:
            return False
        roots = self.units.find(label.ids)
        if (roots == roots[0]).all():
            return False
        labels[dim] = self._moved(label, label.ids[:], (), dim)
        return True

    def _factors(self, inside: list[int], old: Sequence[Label | None]) -> list[tuple[int, Label]]:
        """The labels that make up a group of dimensions, the innermost first.

        One that is over others stands for these, too.
        """
        found: list[tuple[int, Label]] = []
        for dim in reversed(inside):
            label = old[dim]
            assert label is not None
            if any(dim in inner.over for _, inner in found):
                continue  # the rows of this very rectangle
            # The group is flattened in row-major order: rows must come before their columns.
            late = [o for o in label.over if o in inside and o > dim]
            found.append((dim, self.tie(label, late) if late else label))
        return found

    def _flattened(
        self, factors: list[tuple[int, Label]], order: list[int], sizes: list[int]
    ) -> tuple[Label, Ids]:
        """The label that dimensions get when they are flattened, and its units by dimensions in ``order``."""
        arrays = []
        for dim, label in factors:
            names = [*label.over, dim]
            array = label.ids.transpose([names.index(d) for d in order if d in names])
            arrays.append(array[tuple(slice(None) if d in names else None for d in order)])
        (_, label), array = factors[0], arrays[0]
        for (_, outer), rows in zip(factors[1:], arrays[1:], strict=True):
            both = np.broadcast_shapes(array.shape, rows.shape)
            if math.prod(both) > _MOST:
                self.freeze(outer, "flattened with another axis, with too many entries to follow")
                continue
            cells = self.units.fresh(
                *both, of_table=self.units.are_tables(array) and self.units.are_tables(rows)
            )
            self.multiply(cells, rows, array, label.axis)
            self.edges.append((outer.axis, label.axis, self.node))
            array, label = cells, replace(label, over=(), zero=label.zero and outer.zero, row=False)
        return label, np.broadcast_to(array, sizes)

    def _place(
        self,
        labels: list[Label | None],
        label: Label,
        array: Ids,
        out_order: list[int],
        n_outer: int,
    ) -> None:
        """Distribute the reshaped units of one label over the dimensions along which they differ."""
        roots = self.units.find(array)
        varying = []
        for at in range(array.ndim):
            if array.shape[at] > 1 and (roots != roots.take([0], axis=at)).any():
                varying.append(at)
        varying = varying or self._along_one_unit(label, array)
        own = [at for at in varying if at >= n_outer]
        if len(own) > 1 and self._split(labels, label, array, out_order, n_outer):
            return
        if not own:
            if not label.over:
                self.freeze(label, "all indices of the axis form one unit")
            return
        array = array[tuple(slice(None) if at in varying else 0 for at in range(array.ndim))]
        dims = [out_order[at] for at in varying]
        outer = len(varying) - len(own)
        cells = array
        for level in range(len(varying) - 1, outer - 1, -1):
            dim, over = dims[level], tuple(dims[:level])
            axis = self.here(dim)
            row = label.row if level == len(varying) - 1 else True
            labels[dim] = Label(cells, over, axis, label.zero, row)
            self.edges.append((label.axis, axis, self.node))
            if level > outer:
                rows = self._fresh_rows(cells)
                self.rectangle(rows, cells)
                cells = rows

    def _along_one_unit(self, label: Label, array: Ids) -> list[int]:
        """Dimensions to be labelled though all their indices are one unit: none."""
        return []

    def _split(
        self, labels: list[Label | None], label: Label, array: Ids, out_order: list[int], n_outer: int
    ) -> bool:
        """:meth:`_place` for cells whose rows and columns fall on different dimensions, if they do."""
        factors = self.units.factors(array)
        if factors is None:
            return False
        parts = []
        for ids in factors:
            roots = self.units.find(ids)
            parts.append([at for at in range(n_outer, ids.ndim) if (roots != roots.take([0], axis=at)).any()])
        if not parts[0] or not parts[1] or set(parts[0]) & set(parts[1]):
            return False
        for ids, own in zip(factors, parts, strict=True):
            alike = tuple(
                slice(0, 1) if at >= n_outer and at not in own else slice(None) for at in range(ids.ndim)
            )
            self._place(labels, replace(label, over=(), row=False), ids[alike], out_order, n_outer)
        return True

    def _fresh_rows(self, cells: Ids) -> Ids:
        """A unit for each row of ``cells``; rows of the same cells (a batch of heads) are one row."""
        flat = cells.reshape(-1, cells.shape[-1])
        if len(set(self.units.find(flat[:, 0]).tolist())) == flat.shape[0]:
            return self.units.fresh(*cells.shape[:-1], of_table=self.units.are_tables(cells))
        _, kind = np.unique(self.units.find(flat), axis=0, return_inverse=True)
        rows = self.units.fresh(int(kind.max()) + 1, of_table=self.units.are_tables(cells))
        return cast(Ids, rows[kind.reshape(-1)].reshape(cells.shape[:-1]))

    def rows_of(self, value: Value, label: Label) -> Ids:
        """Row units of a label that is over other dimensions; fresh ones where those differ in shape."""
        inner = value.label(label.over[-1])
        if inner is not None and inner.over == label.over[:-1]:
            return inner.ids
        return self.units.fresh(*label.ids.shape[:-1])

    def _moved(self, label: Label, ids: Ids, over: tuple[int, ...], dim: int) -> Label:
        return Label(ids, over, self.passes_on(label, dim), label.zero, label.row)

    def passes_on(self, label: Label, dim: int) -> Axis:
        """Say that dimension ``dim`` of the result goes with a label; gives that dimension."""
        axis = self.here(dim)
        self.edges.append((label.axis, axis, self.node))
        return axis

    def here(self, dim: int) -> Axis:
        """Dimension ``dim`` of what the current node gives."""
        return Axis(self.node.name if self.node is not None else "?", dim)


def _over_rows(label: Label, shape: Sequence[int]) -> Label:
    """The label without rows along dimensions of size 1: one row is none."""
    single = [place for place, dim in enumerate(label.over) if shape[dim] == 1]
    if not single:
        return label
    ids = label.ids[tuple(slice(0, 1) if i in single else slice(None) for i in range(label.ids.ndim))]
    over = tuple(dim for dim in label.over if shape[dim] != 1)
    return replace(label, ids=ids.squeeze(tuple(single)), over=over)
