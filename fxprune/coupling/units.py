"""Units, labels and values: what the coupling analysis computes with.

A **unit** is a number. A **label** says which units the indices of one dimension belong to. Merging
units is a union-find over numpy arrays, so that no operation loops over channels in Python.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

Ids = NDArray[np.int64]

FIXED = 0
"""The unit of every index that is known to stay; it belongs to no group."""


class Axis(NamedTuple):
    """One dimension of one tensor: a parameter, a buffer, or the value of a graph node.

    Attributes:
        name: dotted name of the parameter or buffer, or name of the graph node.
        dim: index of the dimension.
    """

    name: str
    dim: int

    def __str__(self) -> str:
        return f"{self.name}[{self.dim}]"


NOWHERE = Axis("", 0)

NONE: Ids = np.empty(0, dtype=np.int64)
"""No units."""


class Product(NamedTuple):
    """Cells and their parents, three arrays of one shape: a cell goes as soon as its row or its column does.

    A cell is never removed by itself. See :mod:`.products`.
    """

    cells: Ids
    rows: Ids
    columns: Ids
    axis: Axis
    node: fx.Node | None


class Units:
    """Union-find over unit numbers ``0 .. count-1``; unit 0 is :data:`FIXED`.

    With ``anchors > 0`` the units ``1 .. anchors`` are known to be different; merging two of them, or one
    with :data:`FIXED`, is a collision. Collisions are how a rewritten graph is caught. Units of tables
    may meet each other, since tables need not be narrowed.
    """

    def __init__(self, anchors: int = 0) -> None:
        self.anchors = anchors
        self.count = anchors + 1
        self._parent: Ids = np.arange(max(4096, 2 * self.count), dtype=np.int64)
        self._of_table = np.zeros(self._parent.size, dtype=bool)
        self.any_tables = False
        self.products: list[Product] = []
        self._parents = np.full(
            (2, self._parent.size), -1, dtype=np.int64
        )  # rows and columns of cells, by root
        self._rows = np.zeros(self._parent.size, dtype=bool)

    def multiply(self, product: Product) -> None:
        """Say that these units are cells."""
        self.products.append(product)
        cells = self.find(product.cells)
        self._parents[0, cells], self._parents[1, cells] = product.rows, product.columns

    def factors(self, ids: Ids) -> tuple[Ids, Ids] | None:
        """Rows and columns of these units, where all of them are cells, else None."""
        if not self.products:
            return None
        rows, columns = self._parents[:, self.find(ids)]
        return (rows, columns) if (rows >= 0).all() else None

    def parents(self, ids: Ids) -> Ids:
        """Rows and columns of these units, two for each; -1 for one that is no cell."""
        found = self._parents[:, self.find(ids)]
        return np.where(found >= 0, self.find(np.maximum(found, 0)), -1)

    def mark_rows(self, ids: Ids) -> None:
        """Say that these units stand for rows of a rectangle."""
        self._rows[self.find(ids)] = True

    def are_rows(self, ids: Ids) -> bool:
        """Whether all of these units stand for rows of rectangles."""
        return bool(self._rows[self.find(ids)].all())

    def copy(self) -> Units:
        """Another union-find of the same units, in the same classes."""
        new = copy.copy(self)
        new._parent, new._of_table = self._parent.copy(), self._of_table.copy()
        return new

    def fresh(self, *shape: int, of_table: bool = False) -> Ids:
        """New units, as an array of the given shape; for ``of_table`` see :meth:`mark_tables`."""
        start, self.count = self.count, self.count + int(np.prod(shape))
        if self.count > self._parent.size:
            more = np.arange(self._parent.size, 2 * self.count, dtype=np.int64)
            self._parent = np.concatenate([self._parent, more])
            self._of_table = np.concatenate([self._of_table, np.zeros(more.size, dtype=bool)])
            self._rows = np.concatenate([self._rows, np.zeros(more.size, dtype=bool)])
            self._parents = np.concatenate([self._parents, np.full((2, more.size), -1)], axis=1)
        ids = np.arange(start, self.count, dtype=np.int64).reshape(shape)
        if of_table:
            self.mark_tables(ids)
        return ids

    def mark_tables(self, ids: Ids) -> None:
        """Say that these units are those of buffers and constants alone, until they meet others."""
        self._of_table[ids] = True
        self._of_table[FIXED] = False
        self.any_tables |= bool(ids.size)

    def unmark_tables(self, ids: Ids) -> None:
        """Say that these units are a parameter's as well."""
        if self.any_tables:
            self._of_table[self.find(ids)] = False

    def are_tables(self, ids: Ids) -> bool:
        """Whether all of these units, but for :data:`FIXED`, are those of buffers and constants alone."""
        if not self.any_tables:
            return False
        mask = self._of_table[self.find(ids)]
        return bool(mask.any()) and bool((mask | (ids == FIXED)).all())

    def tables(self) -> NDArray[np.bool_]:
        """For each unit whether it is one of tables alone."""
        mask: NDArray[np.bool_] = self._of_table[self.roots()]
        return mask

    def find(self, ids: Ids) -> Ids:
        """The representative (smallest member) of each unit's class; shape as ``ids``."""
        parent = self._parent
        root = parent[ids]
        while True:
            above = parent[root]
            if (above == root).all():
                break
            root = above
        parent[ids] = root
        return root

    def roots(self) -> Ids:
        """The representative of every unit, ``(count,)``."""
        return self.find(np.arange(self.count, dtype=np.int64))

    def merge(self, a: Ids, b: Ids) -> tuple[Ids, bool]:
        """Merge units pairwise (arrays broadcast against each other).

        Returns the units that met :data:`FIXED` (they are not merged with it: the caller freezes them),
        and whether two anchors collided.
        """
        if a is b:
            return NONE, False
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        a, b = a.ravel(), b.ravel()
        met, collided = NONE, False
        both = (a != FIXED) & (b != FIXED)
        if not both.all():
            met = np.maximum(a, b)[(a == FIXED) != (b == FIXED)]
            a, b = a[both], b[both]
        before = NONE
        while True:
            ra, rb = self.find(a), self.find(b)
            differ = ra != rb
            if not differ.any():
                break
            if not before.size:
                before = np.concatenate([ra[differ], rb[differ]])
            high, low = np.maximum(ra, rb)[differ], np.minimum(ra, rb)[differ]
            if self.anchors and (high <= self.anchors).any():
                collided |= bool((~self._of_table[high] | ~self._of_table[low])[high <= self.anchors].any())
                keep = high > self.anchors
                if not keep.any():
                    break
                self._parent[high[keep]] = low[keep]
                break
            np.minimum.at(self._parent, high, low)  # one that meets several goes to the least of them
            if self.any_tables and not self.anchors:
                np.logical_and.at(self._of_table, low, self._of_table[high])
                np.logical_and.at(self._of_table, high, self._of_table[low])
        self._rows[self.find(before[self._rows[before]])] = True
        if self.products:
            known = before[self._parents[0, before] >= 0]
            self._parents[:, self.find(known)] = self._parents[:, known]
        return met, collided


@dataclass(frozen=True, slots=True, eq=False)
class Label:
    """The units of one dimension.

    Attributes:
        ids: ``(*sizes of over, size of the dimension)``; :data:`FIXED` where an index always stays.
        over: dimensions of the same value that choose the row of ``ids``: after
            ``view(B, N, heads, head_dim)`` the label of ``head_dim`` is ``over`` that of ``heads``.
        axis: where the label comes from, for explanations.
        zero: the masked original holds zeros at removed indices.
        row: the units stand for whole rows of a rectangle, not for indices of a parameter.
    """

    ids: Ids
    over: tuple[int, ...]
    axis: Axis
    zero: bool = False
    row: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Open(Label):
    """Stands for the label of a dimension along which all entries are alike (an expanded one).

    It follows whatever it meets first, and with it do all dimensions that were computed from it, or it from
    them: they share one object.

    Attributes:
        holders: the values and dimensions that carry it; empty once they have a label, or none.
    """

    ids: Ids = field(init=False, default_factory=lambda: np.empty(0, dtype=np.int64))
    over: tuple[int, ...] = field(init=False, default=())
    axis: Axis = field(init=False, default=NOWHERE)
    holders: list[tuple[Value, int]] = field(default_factory=list)

    def close(self) -> list[tuple[Value, int]]:
        """Leave the dimensions without a label; gives them, so that they can be given one."""
        holders = list(self.holders)
        self.holders.clear()
        for value, dim in holders:
            value.labels[dim] = None
        return holders

    def join(self, other: Open) -> None:
        """Take over the dimensions of ``other``."""
        if other is not self:
            for value, dim in other.close():
                value.labels[dim] = self
                self.holders.append((value, dim))


@dataclass(slots=True, eq=False)
class State:
    """A tensor whose axes take their labels from what they meet: parameter, buffer or constant.

    Attributes:
        name: name of the parameter or buffer; of the graph node for a constant.
        shape: sizes of the axes.
        tensor: the tensor behind it, None for a constant computed in the graph.
        axes: a label for each axis, None while nothing was met.
        node: the graph node that creates a constant.
        kept: by axis why it keeps its extent, as far as operators have said. Whatever label the axis has
            then, or gets later, is frozen.
        trainable: a parameter, not a buffer or constant.
    """

    name: str
    shape: tuple[int, ...]
    tensor: torch.Tensor | None
    axes: list[Label | None]
    node: fx.Node | None = None
    kept: dict[int, list[Event]] = field(default_factory=dict)
    trainable: bool = field(init=False)

    def __post_init__(self) -> None:
        self.trainable = isinstance(self.tensor, torch.nn.Parameter)


class Parent(NamedTuple):
    """What a value was computed from.

    Attributes:
        value: the other value.
        dims: for each dimension of the value the one of the other, -1 for a new one; None after a row-major
            reshape.
        part: ``(dim, start, stop)`` where only these indices of a dimension of the other were taken;
            ``(dim, -1, -1)`` where they are no block.
        same: the entries are those of the other, in another arrangement.
    """

    value: Value
    dims: Sequence[int] | None = None
    part: tuple[int, int, int] | None = None
    same: bool = True


@dataclass(slots=True, eq=False)
class Value:
    """What is known of a tensor on a graph edge.

    A value is either computed (``labels``) or a view of a state with permuted axes (``state`` and
    ``dims``: the state's axis for each dimension).
    """

    shape: tuple[int, ...]
    labels: list[Label | None]
    state: State | None = None
    dims: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    storage: list[bool] = field(default_factory=lambda: [False])
    """One mutable flag shared by all views: written with something that is not zero when masked."""
    on_use: Sequence[tuple[list[Event], Event]] = ()
    """Events that count as soon as an operator reads the value, with the list that they go to: an average
    over heads that nobody looks at costs nothing."""
    parents: Sequence[Parent] = ()
    """What it was computed from, as far as a product may have to know (see :mod:`.roles`)."""
    derived: bool = False
    """It was computed from parameters, buffers and constants alone."""

    @property
    def fixed(self) -> bool:
        """Whether it does not depend on the inputs."""
        return self.derived or self.state is not None

    def label(self, dim: int) -> Label | None:
        if self.state is None:
            label = self.labels[dim]
            return None if isinstance(label, Open) else label
        label = self.state.axes[self.dims[dim]]
        if label is None or not label.over:
            return label
        over = tuple(self.dims.index(d) for d in label.over)
        return Label(label.ids, over, label.axis, label.zero, label.row)

    def is_open(self, dim: int) -> bool:
        """Whether the dimension has met nothing yet, and may take any label."""
        if self.state is None:
            label = self.labels[dim]
            return isinstance(label, Open) and bool(label.holders)
        return self.state.axes[self.dims[dim]] is None and self.shape[dim] > 1

    def is_zero(self, dim: int) -> bool:
        if self.state is None:
            label = self.labels[dim]  # of an open one, False
        else:
            label = self.state.axes[self.dims[dim]]
            if label is None:
                return self.state.trainable and self.shape[dim] > 1
        return label is not None and label.zero and not self.storage[0]


@dataclass(frozen=True, slots=True, eq=False)
class Rectangle:
    """Cells in rows: a removal takes whole rows, or equally many cells from every row that remains.

    Attributes:
        rows: ``(R,)`` a unit for each row; it dies exactly when all cells of its row die.
        cells: ``(R, columns)``.
        node: the graph node that needs the rectangle.
    """

    rows: Ids
    cells: Ids
    node: fx.Node | None

    @property
    def at(self) -> str:
        """Name of the node, for people."""
        return self.node.name if self.node is not None else "?"


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """Something that happened to units at a node: they were frozen, tied, or met an inexact operator.

    The last axis of ``ids`` is what an inexact operator runs over; the axes before it are rows that it
    treats one by one.
    """

    ids: Ids
    axis: Axis
    node: fx.Node | None
    reason: str
    remedy: str = ""

    @property
    def at(self) -> str:
        """Name of the node, for people."""
        return self.node.name if self.node is not None else "?"


@dataclass(frozen=True, slots=True, eq=False)
class TableUse:
    """A table that met narrower-to-be units in a pointwise operator, and was not merged with them yet.

    A table is a buffer or a constant, or what is computed from such. See :mod:`.tables`.

    Attributes:
        table: one of the operands.
        units: units of the table along one dimension; broadcasts against ``others``.
        others: units of the other operands along that dimension.
        axis: where the units of the table come from.
        others_axis: where the others come from.
    """

    table: Value
    units: Ids
    others: Ids
    axis: Axis
    others_axis: Axis


@dataclass(frozen=True, slots=True, eq=False)
class Take:
    """How a node picks indices along one dimension.

    Attributes:
        value: what is picked from; the output of another node.
        dim: the dimension.
        index: ``(size of the result along dim,)`` positions in ``value``.
    """

    value: Value
    dim: int
    index: Ids


def aligned(ids: NDArray[Any], over: Sequence[object], target: Sequence[object]) -> NDArray[Any]:
    """View ``ids`` with axes ``(*over, own)`` as ``(*target, own)``; missing axes have size 1."""
    if tuple(over) == tuple(target):
        return ids
    order = [over.index(name) for name in target if name in over]
    ids = ids.transpose([*order, ids.ndim - 1])
    return ids[tuple([slice(None) if name in over else None for name in target] + [slice(None)])]
