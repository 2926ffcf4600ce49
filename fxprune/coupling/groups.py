"""Group: from units and rectangles to sets of units that are decided together.

Units that label the same axes are interchangeable. Among them, those that lie in the same rows of every
rectangle form an *atom*: only their number matters to the rectangle. Rows that must stay equally long
link their atoms. A group is a connected component of the graph of atoms; within a group, linked atoms
(a *balanced set*) lose the same share of their units each, and each chooses its own.

Whole rows (attention heads, groups of a convolution) are the second granularity of the same structure: a
row goes when all of its units go, in every rectangle that it is a row of.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray

from .coupler import Coupler
from .units import FIXED, Axis, Event, Ids, Rectangle, State, Units

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Member:
    """An axis of a parameter or buffer, some of whose indices belong to the units of a group.

    Attributes:
        axis: name of the tensor and dimension.
        tensor: the tensor itself.
        over: dimensions of the tensor that choose the row of ``units``.
        units: position within ``group.units`` for each index, -1 where the index belongs to none;
            ``(*sizes of over, size of the axis)``.
        trainable: a parameter, not a buffer.
    """

    axis: Axis
    tensor: torch.Tensor
    over: tuple[int, ...]
    units: Ids
    trainable: bool

    def __repr__(self) -> str:
        shape = tuple(self.tensor.shape)
        return (
            f"Member({self.axis}, shape={shape}, {int((self.units >= 0).sum())} of {self.units.size} indices)"
        )


@dataclass(frozen=True, eq=False)
class Group:
    """Units that live and die with the same members.

    Attributes:
        name: the first axis of the group, as ``parameter[dim]``; the same in every run. Further groups
            with the same first axis are ``parameter[dim]:2``, ``:3``, ...
        units: unit numbers, in the order in which they appear on the first axis, ``(size,)``.
        balance: balanced sets; each is a tuple of rows, each row an array of positions in ``units``.
            Every row of a set loses the same share of its units (rows differ in size where a unit takes
            up several columns, as with a rotary table).
        exact: no normalisation or reduction runs over the group's axes, so that the pruned network
            equals the masked one.
        inexact_because: what makes it inexact, with the node; empty if exact.
    """

    name: str
    units: Ids
    balance: tuple[tuple[Ids, ...], ...]
    exact: bool
    inexact_because: str
    _build: Any = field(repr=False)
    _find_rows: Callable[[], tuple[RowSet, ...]] = field(repr=False)

    @property
    def size(self) -> int:
        """Number of units."""
        return int(self.units.size)

    @cached_property
    def rows(self) -> tuple[Ids, ...]:
        """Positions in ``units`` of each row (attention head, convolution group) that can go as a whole.

        A row that lies in several groups goes from all of them or from none: see :class:`RowSet`.
        """
        return tuple(row[self.name] for rows in self._find_rows() for row in rows.rows if self.name in row)

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Axes of parameters and buffers that are narrowed with this group, in state-dict order."""
        members: tuple[Member, ...] = self._build(self)
        return members

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        rows = len(self.rows) or sum(len(rows) for rows in self.balance)
        shape = f"{self.size} units" + (f" in {rows} rows" if rows > 1 else "")
        kind = "exact" if self.exact else f"inexact: {self.inexact_because}"
        return f"Group({self.name}: {shape}, {len(self.members)} members, {kind})"


@dataclass(frozen=True, eq=False)
class RowSet:
    """Rows that can be removed as a whole, one by one: the heads of an attention, groups of a convolution.

    A row goes when all of its units go, from all of its groups. Axes that are indexed by row alone (a bias
    for each head) follow.

    Attributes:
        rows: for each row its units, as positions by the name of the group.
        total: number of rows, with those that have to stay.
        together: sets of rows (as positions in ``rows``), of each of which one at least has to stay.
        classes: for each row every class that dies with it.
        members: axes indexed by row alone; ``units`` are positions in ``rows``.
    """

    rows: tuple[Mapping[str, Ids], ...]
    total: int
    together: tuple[Ids, ...]
    classes: tuple[Ids, ...]
    members: tuple[Member, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups that the rows have units in."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"RowSet({len(self)} of {self.total} rows can go from {', '.join(self.groups)})"


@dataclass(frozen=True)
class Grouping:
    """Result of :func:`form_groups`: the groups, and what the axes are made of.

    Attributes:
        groups: in the order of their first axis.
        roots: class of each unit number.
        prunable: whether a class belongs to a group, by class.
        events: why classes are frozen, in order of discovery.
        rectangles: those whose rows do not live and die as one.
    """

    groups: tuple[Group, ...]
    roots: Ids
    prunable: Mask
    events: tuple[Event, ...]
    rectangles: tuple[Rectangle, ...]
    _find_rows: Callable[[], tuple[tuple[RowSet, ...], tuple[Event, ...]]] = field(repr=False)

    @property
    def rows(self) -> tuple[RowSet, ...]:
        """Rows that can be removed, structure by structure."""
        return self._find_rows()[0]

    @property
    def row_events(self) -> tuple[Event, ...]:
        """Why other rows cannot."""
        return self._find_rows()[1]


def form_groups(
    coupler: Coupler, states: Sequence[State], trainable: Mapping[str, bool], extra: Sequence[Event] = ()
) -> Grouping:
    """Resolve the rectangles and collect the groups.

    Args:
        coupler: the finished analysis.
        states: parameters and buffers in state-dict order.
        trainable: whether a state is a parameter, by name.
        extra: further freezes (from the rewriter).
    """
    events = [*coupler.frozen, *extra]
    open_rectangles = _resolve(coupler)
    roots = coupler.units.roots()
    frozen = np.zeros(coupler.units.count, dtype=bool)
    frozen[FIXED] = True
    for event in events:
        frozen[roots[event.ids]] = True
    is_row = np.zeros(coupler.units.count, dtype=bool)
    for rectangle in open_rectangles:
        is_row[roots[rectangle.rows]] = True
    keyed = _axis_keys(states, roots)
    signature = np.zeros(coupler.units.count, dtype=np.uint64)
    for key, ids, _ in keyed:
        np.add.at(signature, ids, key)
    present = np.zeros(coupler.units.count, dtype=bool)
    for _, ids, is_member in keyed:
        if is_member(trainable):
            present[ids] = True
    order = _order_of_appearance(keyed, roots.size)
    while True:
        prunable = present & ~frozen & ~is_row
        bands, broken = _balance(open_rectangles, roots, prunable, signature)
        if not broken:
            break
        for rectangle in broken:
            cells = np.unique(roots[rectangle.cells])
            frozen[cells] = True
            reason = "rows of unequal make-up cannot be kept equally long"
            events.append(Event(cells, Axis(_name(rectangle.node), 1), rectangle.node, reason))
    inexact = np.full(roots.size, len(coupler.inexact))
    for number in range(len(coupler.inexact) - 1, -1, -1):
        inexact[roots[coupler.inexact[number].ids]] = number

    @functools.cache
    def find_rows() -> tuple[tuple[RowSet, ...], tuple[Event, ...]]:
        finder = _RowFinder(open_rectangles, roots, frozen, is_row, bands, groups)
        finder.keep(coupler.inexact)
        row_sets = finder.row_sets(states, trainable)
        return row_sets, finder.events

    groups = _collect(
        bands, signature, order, states, trainable, roots, inexact, coupler.inexact, lambda: find_rows()[0]
    )
    return Grouping(groups, roots, prunable, tuple(events), tuple(open_rectangles), find_rows)


def _name(node: Any) -> str:
    return node.name if node is not None else "?"


def _resolve(coupler: Coupler) -> list[Rectangle]:
    """Merge rows with their cells where a row lives and dies as one; return the other rectangles."""
    rest = list(coupler.rectangles)
    while True:
        units, left = coupler.units, []
        for rectangle in rest:
            cells = units.find(rectangle.cells)
            if (cells == cells[:, :1]).all():
                units.merge(rectangle.rows, rectangle.cells[:, 0])
            else:
                left.append(rectangle)
        if len(left) == len(rest):
            return left
        rest = left


def _axis_keys(states: Sequence[State], roots: Ids) -> list[tuple[np.uint64, Ids, Any]]:
    """Per distinct array of units on state axes: a random key, the classes, and who is labelled by it."""
    rng = np.random.default_rng(0)
    by_array: dict[int, tuple[list[np.uint64], Ids, list[str]]] = {}
    for state in states:
        for label in state.axes:
            key = rng.integers(1, 2**63, dtype=np.uint64)
            if label is not None:
                keys, _, names = by_array.setdefault(id(label.ids), ([], label.ids, []))
                keys.append(key)
                names.append(state.name)
    keyed = []
    for keys, ids, names in by_array.values():
        total = np.add.reduce(np.array(keys, dtype=np.uint64))

        def is_member(trainable: Mapping[str, bool], names: list[str] = names) -> bool:
            return any(trainable[name] for name in names)

        keyed.append((total, roots[ids].reshape(-1), is_member))
    return keyed


def _order_of_appearance(keyed: Sequence[tuple[np.uint64, Ids, Any]], count: int) -> Ids:
    """A rank for each class: classes seen earlier on earlier axes come first."""
    rank = np.full(count, np.iinfo(np.int64).max, dtype=np.int64)
    offset = 0
    for _, ids, _ in keyed:
        positions = np.arange(offset, offset + ids.size)
        np.minimum.at(rank, ids, positions)
        offset += ids.size
    return rank


Band = tuple[Ids, ...]
"""Atoms (arrays of classes) that take up equally many columns, and lose the same share of their units."""


def _balance(
    rectangles: Sequence[Rectangle], roots: Ids, prunable: np.ndarray[Any, Any], signature: Any
) -> tuple[list[Band], list[Rectangle]]:
    """Atoms linked into balanced sets, and rectangles whose rows cannot be matched."""
    rng = np.random.default_rng(1)
    place = signature.copy()
    constraints = []
    for rectangle in rectangles:
        cells = roots[rectangle.cells]
        n_rows = cells.shape[0]
        inside = np.unique(cells[prunable[cells]])
        if not inside.size:
            continue
        index = np.full(int(inside[-1]) + 1, -1)
        index[inside] = np.arange(inside.size)
        counts = np.zeros((inside.size, n_rows), dtype=np.int64)
        rows, columns = np.nonzero(prunable[cells])
        np.add.at(counts, (index[cells[rows, columns]], rows), 1)
        uneven = (counts != counts[:, :1]).any(axis=1)
        if not uneven.any():
            continue  # every unit lies equally often in every row: balanced by itself
        keys = rng.integers(1, 2**62, size=n_rows, dtype=np.uint64)
        with np.errstate(over="ignore"):
            place[inside[uneven]] += (counts[uneven].astype(np.uint64) * keys).sum(axis=1, dtype=np.uint64)
        constraints.append((rectangle, inside[uneven], counts[uneven]))
    classes = np.flatnonzero(prunable)
    _, inverse = np.unique(place[classes], return_inverse=True)
    by_atom = np.argsort(inverse, kind="stable")
    atoms = np.split(classes[by_atom], np.flatnonzero(np.diff(inverse[by_atom])) + 1) if classes.size else []
    links = nx.Graph()
    links.add_nodes_from(range(len(atoms)))
    atom_of = np.full(roots.size, -1)
    atom_of[classes] = inverse
    first = np.array([atom[0] for atom in atoms], dtype=np.int64)
    size = np.array([atom.size for atom in atoms], dtype=np.int64)
    broken = []
    for rectangle, inside, counts in constraints:
        numbers = np.unique(atom_of[inside])
        unit_counts = counts[np.searchsorted(inside, first[numbers])]
        which, rows = np.nonzero(unit_counts)
        held = numbers[which]
        columns, signatures = size[held] * unit_counts[which, rows], signature[first[held]]
        rows_atoms = defaultdict(list)
        for row, *atom in zip(*(array.tolist() for array in (rows, columns, signatures, held)), strict=True):
            rows_atoms[row].append(tuple(atom))
        by_row = [sorted(rows_atoms.get(row, [])) for row in range(counts.shape[1])]
        shapes = [[atom[0] for atom in row] for row in by_row]
        if any(shape != shapes[0] for shape in shapes):
            broken.append(rectangle)
            continue
        for other in by_row[1:]:
            links.add_edges_from((a[2], b[2]) for a, b in zip(by_row[0], other, strict=True) if a[2] != b[2])
    bands = [tuple(atoms[i] for i in sorted(part)) for part in nx.connected_components(links)]
    return bands, broken


def _collect(
    bands: Sequence[Band],
    signature: Any,
    order: Ids,
    states: Sequence[State],
    trainable: Mapping[str, bool],
    roots: Ids,
    inexact: Ids,
    reasons: Sequence[Event],
    find_rows: Callable[[], tuple[RowSet, ...]],
) -> tuple[Group, ...]:
    """Join balanced sets that share member axes into groups."""
    graph = nx.Graph()
    for number, band in enumerate(bands):
        for atom in band:
            graph.add_edge(("band", number), ("axes", int(signature[atom[0]])))
    components = []
    for part in nx.connected_components(graph):
        own = [bands[number] for kind, number in part if kind == "band"]
        units = np.concatenate([atom for band in own for atom in band])
        units = units[np.argsort(order[units], kind="stable")]
        own.sort(key=lambda band: min(int(order[atom].min()) for atom in band))
        components.append((units, own))
    components.sort(key=lambda item: int(order[item[0][0]]))
    group_of = np.full(roots.size, -1, dtype=np.int64)
    position = np.full(roots.size, -1, dtype=np.int64)
    for number, (units, _) in enumerate(components):
        group_of[units] = number
        position[units] = np.arange(units.size)
    axes: dict[int, list[tuple[State, int]]] = defaultdict(list)
    touched: dict[int, Ids] = {}
    for state in states:
        for dim, label in enumerate(state.axes):
            if label is not None:
                if id(label.ids) not in touched:
                    touched[id(label.ids)] = np.unique(group_of[roots[label.ids]])
                for number in touched[id(label.ids)].tolist():
                    if number >= 0:
                        axes[number].append((state, dim))

    def build(number: int) -> Any:
        def members(group: Group) -> tuple[Member, ...]:
            found = []
            for state, dim in axes[number]:
                label = state.axes[dim]
                assert label is not None
                assert state.tensor is not None
                classes = roots[label.ids]
                units = np.where(group_of[classes] == number, position[classes], -1)
                axis = Axis(state.name, dim)
                found.append(Member(axis, state.tensor, label.over, units, trainable[state.name]))
            return tuple(found)

        return members

    groups: list[Group] = []
    taken: dict[str, int] = defaultdict(int)
    for number, (units, own) in enumerate(components):
        state, dim = axes[number][0]
        name = str(Axis(state.name, dim))
        taken[name] += 1
        if taken[name] > 1:  # an axis may hold the units of several groups
            name = f"{name}:{taken[name]}"
        balance = tuple(
            tuple(np.sort(position[atom]) for atom in sorted(band, key=lambda a: int(order[a].min())))
            for band in own
        )
        number_of = int(inexact[units].min())
        event = reasons[number_of] if number_of < len(reasons) else None
        because = f"{event.reason} at {_name(event.node)}" if event is not None else ""
        groups.append(Group(name, units, balance, event is None, because, build(number), find_rows))
    return tuple(groups)


class _RowFinder:
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
        bands: Sequence[Band],
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
        self._band = np.full(roots.size, -1, dtype=np.int64)
        for number, band in enumerate(bands):
            for atom in band:
                self._band[atom] = number
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
        key = owners * (int(self._band.max(initial=0)) + 2) + self._band[cells[row, column]] + 1
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
                axis = Axis(_name(rectangle.node), 0)
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
                        axis = Axis(state.name, dim)
                        found[structure].append(
                            Member(axis, state.tensor, label.over, units, trainable[state.name])
                        )
        return found
