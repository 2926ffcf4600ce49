"""Products of axes: cells that go as soon as their row goes, or their column.

Where two axes that are narrowed independently are flattened into one (the inputs and the coefficients of a
spline, a head's columns and its state), an index of the flat axis goes when either of its two units does. And
where the columns of all rows are tied to each other (a norm with a weight for each column of a head), a cell
goes with its column from all rows, or with its whole row. Both are a *cell*: a unit that is removed through
its two parents, a *row* and a *column*, and never by itself.

What a class of units is a product of is known when the whole graph is: :func:`close` finds out what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .units import NONE, Event, Ids, Product, Rectangle, Units

Mask = NDArray[np.bool_]

_STAYS = "goes with another axis that cannot be narrowed"


@dataclass(frozen=True, eq=False)
class Cells:
    """The classes that are cells, each once; those that are parents of others come before these.

    Attributes:
        cells: classes, ``(cells,)``.
        rows: the class of each one's row.
        columns: the class of each one's column.
        count: number of classes, of cells and others.
    """

    cells: Ids
    rows: Ids
    columns: Ids
    count: int

    def inherit(self, join: np.ufunc, values: NDArray[np.generic]) -> None:
        """By class, in place: give cells what their parents have."""
        for cells, rows, columns in self._levels:
            values[cells] = join(values[rows], values[columns])

    def collect(self, join: np.ufunc, values: NDArray[np.generic]) -> None:
        """By class, in place: join what is known of cells to what is known of their parents."""
        for cells, rows, columns in reversed(self._levels):
            for parents in (rows, columns):
                join.at(values, parents, values[cells])

    def ancestors(self, classes: Ids) -> Ids:
        """These classes, the parents of those that are cells, and theirs; some may be there twice."""
        found = [classes]
        while found[-1].size:
            rows, columns = self._by_class[:, found[-1]]
            inside = rows >= 0
            found.append(np.concatenate([rows[inside], columns[inside]]))
        return np.concatenate(found)

    def look_up(self, classes: Ids, of_class: Callable[[Ids], Ids]) -> Ids:
        """``of_class`` of these classes, for cells the largest of their ancestors."""
        found = of_class(classes)
        rows, columns = self._by_class[:, classes]
        inside = rows >= 0
        if inside.any():
            above = (self.look_up(parents[inside], of_class) for parents in (rows, columns))
            found[inside] = np.maximum(*above)
        return found

    @cached_property
    def _by_class(self) -> Ids:
        """Row and column of each class, ``(2, classes)``; -1 where it is no cell."""
        parents = np.full((2, self.count), -1, dtype=np.int64)
        parents[0, self.cells], parents[1, self.cells] = self.rows, self.columns
        return parents

    @cached_property
    def _levels(self) -> list[tuple[Ids, Ids, Ids]]:
        """The cells in parts; all parents that are cells lie in parts before."""
        size = int(max(ids.max(initial=0) for ids in (self.cells, self.rows, self.columns))) + 1
        level = np.zeros(size, dtype=np.int64)
        level[self.cells] = 1
        while True:
            above = np.maximum(level[self.rows], level[self.columns]) + 1
            if (level[self.cells] == above).all():
                break
            level[self.cells] = above
        depth = level[self.cells]
        parts = (np.flatnonzero(depth == number) for number in range(1, int(depth.max(initial=0)) + 1))
        return [(self.cells[part], self.rows[part], self.columns[part]) for part in parts]


class Closed(NamedTuple):
    """What follows from products.

    Attributes:
        roots: class of each unit number.
        frozen: by class whether it stays.
        cells: the classes that are cells.
        balanced: the rectangles that removals have to keep balanced, with columns in place of cells.
        rectangles: these and those that stay balanced by themselves, as they were.
        units: classes of rows that are none any more, since nothing has to be balanced among them.
        events: what had to be frozen.
    """

    roots: Ids
    frozen: Mask
    cells: Cells
    balanced: list[Rectangle]
    rectangles: list[Rectangle]
    units: Ids
    events: list[Event]


def close(roots: Ids, frozen: Mask, products: Sequence[Product], rectangles: Sequence[Rectangle]) -> Closed:
    """Merge and freeze classes until every class of cells has one row and one column.

    - A cell with a parent that stays goes with the other one alone; a cell that stays keeps both.
    - Cells that are one have one row and one column.
    - The column of a cell that is its own row stays.
    - In a rectangle, a row whose cells have one row in common is that row, and counts by their columns. Of
      what a rectangle has cells in any other order, the columns stay: it goes by row.

    Args:
        roots: class of each unit number.
        frozen: by class whether it stays.
        products: all of them.
        rectangles: those whose rows do not live and die as one.
    """
    if not products:
        return Closed(
            roots, frozen, Cells(NONE, NONE, NONE, roots.size), list(rectangles), list(rectangles), NONE, []
        )
    return _Closing(roots, frozen, products, rectangles).run()


_PARTS = ("cells", "rows", "columns")


class _Closing:
    def __init__(
        self, roots: Ids, frozen: Mask, products: Sequence[Product], rectangles: Sequence[Rectangle]
    ) -> None:
        self.roots, self.frozen, self.rectangles = roots, frozen.copy(), list(rectangles)
        self.products = products
        parts = ([getattr(product, name).ravel() for product in products] for name in _PARTS)
        self.given = [np.concatenate(part) for part in parts]
        self.classes = Units()
        self.classes.fresh(roots.size)
        self.events: list[Event] = []
        self.changed = False

    def run(self) -> Closed:
        while True:
            self.changed = False
            self._settle()
            if self._moved():
                continue
            cells = self._cells()
            if self._moved():
                continue
            balanced, units = self._substitute(cells)
            if not self._moved():
                roots = self.find(np.arange(self.roots.size))
                return Closed(roots, self.frozen, cells, balanced, self.rectangles, units, self.events)

    def _moved(self) -> bool:
        """Whether something was merged or frozen, so that it has to be looked at again."""
        return self.changed

    def find(self, ids: Ids) -> Ids:
        """The present classes of units or classes; in ``classes``, unit 0 is not merged."""
        found: Ids = self.classes.find(self.roots[ids] + 1) - 1
        return found

    def merge(self, a: Ids, b: Ids) -> None:
        a, b = self.find(a), self.find(b)
        if (a != b).any():
            self.classes.merge(a + 1, b + 1)
            self.frozen[self.find(a[self.frozen[a] | self.frozen[b]])] = True
            self.changed = True

    def freeze(self, ids: Ids, reason: str = _STAYS) -> None:
        ids = self.find(ids)
        new = ids[~self.frozen[ids]]
        if new.size:
            product = self.products[-1]
            self.frozen[new] = True
            self.events.append(Event(new, product.axis, product.node, reason))
            self.changed = True

    def _settle(self) -> None:
        """What follows from single products, and from those of one cell."""
        cell, row, column = map(self.find, self.given)
        stays = self.frozen[cell]
        self.freeze(row[stays])
        self.freeze(column[stays])
        one, other = self.frozen[row], self.frozen[column]
        self.freeze(cell[one & other])
        self.merge(cell[other & ~one], row[other & ~one])
        self.merge(cell[one & ~other], column[one & ~other])
        live = ~one & ~other
        self.merge(cell[live & (row == column)], row[live & (row == column)])
        live &= row != column
        self.freeze(column[live & (cell == row)])
        self.freeze(row[live & (cell == column)])
        order = np.flatnonzero(live)
        order = order[np.argsort(cell[order], kind="stable")]
        starts = np.flatnonzero(np.diff(cell[order], prepend=-1))
        first = order[np.repeat(starts, np.diff(starts, append=order.size))]
        self.merge(row[order], row[first])
        self.merge(column[order], column[first])

    def _cells(self) -> Cells:
        """The cells that are left, those that are parents first; of circles, the columns stay."""
        cell, row, column = map(self.find, self.given)
        live = np.flatnonzero(~self.frozen[row] & ~self.frozen[column] & (cell != row) & (cell != column))
        _, where = np.unique(cell[live], return_index=True)
        cells, rows, columns = (ids[live[where]] for ids in (cell, row, column))
        left = np.arange(cells.size)
        while left.size:
            waiting = np.isin(rows[left], cells[left]) | np.isin(columns[left], cells[left])
            if waiting.all():
                self.freeze(columns[left])
                break
            left = left[waiting]
        return Cells(cells, rows, columns, self.roots.size)

    def _substitute(self, cells: Cells) -> tuple[list[Rectangle], Ids]:
        """The rectangles with columns in place of cells, and rows that nothing has to be balanced among."""
        row_of, column_of = np.full((2, self.roots.size), -1, dtype=np.int64)
        row_of[cells.cells], column_of[cells.cells] = cells.rows, cells.columns
        balanced: list[Rectangle] = []
        kept: list[Rectangle] = []
        single: list[Ids] = []
        for rectangle in self.rectangles:
            rows, inside = self.find(rectangle.rows), self.find(rectangle.cells)
            if (inside == inside[:, :1]).all():  # its rows live and die as one
                self.merge(rows, inside[:, 0])
                continue
            kept.append(rectangle)
            is_cell = row_of[inside] >= 0
            if not is_cell.any():
                balanced.append(rectangle)
                continue
            whole = is_cell.all(axis=1)
            above, across = row_of[inside], column_of[inside]
            by_row = whole & (above == above[:, :1]).all(axis=1)
            by_column = whole & ~by_row & (across == across[:, :1]).all(axis=1)
            rest = is_cell & ~(by_row | by_column)[:, None]
            if rest.any():
                self.freeze(across[rest], "is part of rows of unequal make-up")
                continue
            self.merge(rows[by_row], above[by_row, 0])
            self.merge(rows[by_column], across[by_column, 0])
            counted = np.where(by_row[:, None], across, np.where(by_column[:, None], above, inside))
            if whole.all() and (np.sort(counted, axis=1) == np.sort(counted[:1], axis=1)).all():
                single.append(rows)
            else:
                balanced.append(replace(rectangle, rows=rows, cells=counted))
        self.rectangles = kept
        if self.changed or not single:
            return balanced, NONE
        needed = np.concatenate([NONE, *(self.find(rectangle.rows) for rectangle in balanced)])
        return balanced, np.setdiff1d(np.concatenate(single), needed)


def groups_of_cells(cells: Cells, number: Ids) -> Ids:
    """The columns of cells both of whose parents belong to one group; ``number`` by class, -1 for none."""
    sets: list[frozenset[int]] = [
        frozenset(),
        *(frozenset([n]) for n in range(int(number.max(initial=-1)) + 1)),
    ]
    known = {found: place for place, found in enumerate(sets)}
    of = number + 1  # by class, where among ``sets``
    both: list[Ids] = []
    for own, rows, columns in cells._levels:
        pairs, which = np.unique(np.stack([of[rows], of[columns]]), axis=1, return_inverse=True)
        joined = []
        for a, b in pairs.T.tolist():
            union = sets[a] | sets[b]
            if union not in known:
                known[union] = len(sets)
                sets.append(union)
            joined.append((known[union], bool(sets[a] & sets[b])))
        of[own] = np.array([place for place, _ in joined], dtype=np.int64)[which.reshape(-1)]
        both.append(columns[np.array([clash for _, clash in joined], dtype=bool)[which.reshape(-1)]])
    return np.concatenate([NONE, *both])


__all__ = ["Cells", "Closed", "close", "groups_of_cells"]
