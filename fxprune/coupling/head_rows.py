"""Rows that go as a whole: which heads of an attention, which groups of a convolution can be removed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from .groups import BalancedSet, Group, Mask, Member, RowSet
from .units import FIXED, Axis, Event, Ids, Rectangle, State, Units


class RowFinder:
    """Finds the rows that can go as a whole.

    What dies with a row, a *block*, is a connected component of rows and their cells over all rectangles.
    A rectangle whose rows are blocks stays one, whichever of them go. Where rows have to stay (query, key
    and value of a fused projection are picked by number), a block must take equally many cells from each.
    """

    def __init__(
        self,
        rectangles: Sequence[Rectangle],
        roots: Ids,
        frozen: Mask,
        is_row: Mask,
        balanced_sets: Sequence[BalancedSet],
        groups: tuple[Group, ...],
    ) -> None:
        self.rectangles, self.roots, self.is_row, self.groups = rectangles, roots, is_row, groups
        self.events: tuple[Event, ...] = ()
        self.free_rows = is_row & ~frozen
        blocks, structures = Units(), Units()
        for units in (blocks, structures):
            units.fresh(roots.size)
        stuck = frozen.copy()
        for rectangle in rectangles:
            rows, cells = roots[rectangle.rows], roots[rectangle.cells]
            free = self.free_rows[rows]
            if free.any():
                stuck[rows[free & (cells == FIXED).any(axis=1)]] = True
                blocks.merge(rows[free][:, None], cells[free])
                structures.merge(rows[free][:1], rows[free])
        self.block = blocks.find(np.arange(roots.size))
        self.block_of_row = np.zeros(roots.size, dtype=bool)  # by block: whether it has a row that may go
        self.block_of_row[self.block[self.free_rows]] = True
        self.stuck: Mask = np.zeros(roots.size, dtype=bool)
        self.stuck[self.block[stuck]] = True
        free_rows = np.flatnonzero(self.free_rows)
        structures.merge(free_rows, self.block[free_rows])
        self.structure = structures.find(np.arange(roots.size))
        self._set = np.full(roots.size, -1, dtype=np.int64)
        for number, atoms in enumerate(balanced_sets):
            for atom in atoms:
                self._set[atom] = number
        for rectangle in rectangles:
            self._check(rectangle)

    def keep(self, events: Sequence[Event]) -> None:
        """Rows over which an inexact operator runs stay."""
        found = []
        for event in events:
            rows = self.roots[event.ids]
            rows = rows[self.free_rows[rows]]
            if rows.size:
                self.stuck[self.block[rows]] = True
                found.append(Event(rows, event.axis, event.node, event.reason, event.remedy))
        self.events += tuple(found)

    def _check(self, rectangle: Rectangle) -> None:
        """Rows that stay must lose equally many cells with each block, and of each balanced set."""
        stay = ~self.free_rows[self.roots[rectangle.rows]]
        if not stay.any():
            return
        cells = self.roots[rectangle.cells]
        owner = np.where(self.block_of_row[self.block[cells]], self.block[cells], -1)
        row, column = np.nonzero(owner >= 0)
        if not row.size:
            return
        owners = owner[row, column]
        key = owners * (int(self._set.max(initial=0)) + 2) + self._set[cells[row, column]] + 1
        _, first, kind = np.unique(key, return_index=True, return_inverse=True)
        counts = np.zeros((first.size, cells.shape[0]), dtype=np.int64)
        np.add.at(counts, (kind, row), 1)
        uneven = (counts != counts[:, :1]).any(axis=1) & (counts[:, stay] > 0).any(axis=1)
        self.stuck[owners[first[uneven]]] = True

    def row_sets(self, states: Sequence[State], trainable: Mapping[str, bool]) -> tuple[RowSet, ...]:
        """The rows that can go, structure by structure in the order of the groups."""
        number_of = np.full(self.roots.size, -1, dtype=np.int64)  # by block: its row in its structure
        structures: dict[int, list[int]] = defaultdict(list)  # blocks that can go
        totals: dict[int, int] = defaultdict(int)
        parts: dict[int, dict[str, Ids]] = defaultdict(dict)
        for group in self.groups:
            blocks = self.block[group.units]
            inside = np.flatnonzero(self.block_of_row[blocks])
            order = inside[np.argsort(blocks[inside], kind="stable")]
            edges = np.flatnonzero(np.diff(blocks[order])) + 1
            pieces = np.split(order, edges) if order.size else []
            for piece in sorted(pieces, key=lambda piece: int(piece[0])):
                block = int(blocks[piece[0]])
                if block not in parts:
                    structure = int(self.structure[block])
                    totals[structure] += 1
                    if not self.stuck[block]:
                        number_of[block] = len(structures[structure])
                        structures[structure].append(block)
                parts[block][group.name] = piece
        structures = {key: blocks for key, blocks in structures.items() if blocks and totals[key] > 1}
        self._explain(set(structures))
        by_block = np.argsort(self.block, kind="stable")
        starts = np.searchsorted(self.block[by_block], np.arange(self.roots.size + 1))
        members = self._members(states, trainable, number_of, set(structures))
        together = self._together(number_of)
        return tuple(
            RowSet(
                tuple(parts[block] for block in blocks),
                totals[structure],
                tuple(together.get(structure, {}).values()),
                tuple(by_block[starts[block] : starts[block + 1]] for block in blocks),
                tuple(members.get(structure, ())),
            )
            for structure, blocks in structures.items()
        )

    def _explain(self, structures: set[int]) -> None:
        """Say why rows stay for which no operator gave a reason."""
        found = []
        for rectangle in self.rectangles:
            rows = self.roots[rectangle.rows]
            rows = rows[self.free_rows[rows]]
            movable = np.isin(self.structure[rows], list(structures)) & ~self.stuck[self.block[rows]]
            if not movable.all():
                axis = Axis(rectangle.at, 0)
                reason = "stands for whole rows (heads, groups) that cannot go one by one"
                found.append(Event(rows[~movable], axis, rectangle.node, reason))
        self.events += tuple(found)

    def _together(self, number_of: Ids) -> dict[int, dict[bytes, Ids]]:
        """By structure, the sets of rows that make up a whole rectangle."""
        found: dict[int, dict[bytes, Ids]] = defaultdict(dict)
        for rectangle in self.rectangles:
            rows, cells = self.roots[rectangle.rows], self.roots[rectangle.cells]
            free = self.free_rows[rows]
            if free.all():
                blocks = self.block[rows]
            elif not free.any():
                blocks = self.block[cells].reshape(-1)
            else:
                continue  # a row that stays is among them
            numbers = np.unique(number_of[blocks])
            if numbers[0] >= 0 and (self.structure[blocks] == self.structure[blocks[0]]).all():
                found[int(self.structure[blocks[0]])][numbers.tobytes()] = numbers
        return found

    def _members(
        self, states: Sequence[State], trainable: Mapping[str, bool], number_of: Ids, structures: set[int]
    ) -> dict[int, list[Member]]:
        found: dict[int, list[Member]] = defaultdict(list)
        for state in states:
            for dim, label in enumerate(state.axes):
                if label is None or state.tensor is None:
                    continue
                classes = self.roots[label.ids]
                rows = classes[self.free_rows[classes]]
                for structure in np.unique(self.structure[rows]).tolist() if rows.size else []:
                    if structure in structures:
                        own = self.free_rows[classes] & (self.structure[classes] == structure)
                        units = np.where(own, number_of[self.block[classes]], -1)
                        axis, learnt = Axis(state.name, dim), trainable[state.name]
                        found[structure].append(
                            Member(axis, state.tensor, label.over, units, learnt, learnt and label.zero)
                        )
        return found
