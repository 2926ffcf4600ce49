"""Group: from units and rectangles to sets of units that are decided together.

Units that label the same axes are interchangeable. Among them, those that lie in the same rows of every
rectangle form an *atom*: only their number matters to the rectangle. Rows that must stay equally long
link their atoms. A group is a connected component of the graph of atoms; within a group, linked atoms
(a *balanced set*) lose the same share of their units each, and each chooses its own.

Whole rows (attention heads, groups of a convolution) are the second granularity of the same structure: a
row goes when all of its units go, in every rectangle that it is a row of (:mod:`.rows`).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np

from .coupler import Coupler
from .groups import Band, Group, Grouping, Mask, Member, RowSet
from .rows import RowFinder
from .units import FIXED, Axis, Event, Ids, Rectangle, State


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
            events.append(Event(cells, Axis(rectangle.at, 1), rectangle.node, reason))
    inexact = np.full(roots.size, len(coupler.inexact))
    for number in range(len(coupler.inexact) - 1, -1, -1):
        inexact[roots[coupler.inexact[number].ids]] = number

    @functools.cache
    def find_rows() -> tuple[tuple[RowSet, ...], tuple[Event, ...]]:
        finder = RowFinder(open_rectangles, roots, frozen, is_row, bands, groups)
        finder.keep(coupler.inexact)
        row_sets = finder.row_sets(states, trainable)
        return row_sets, finder.events

    groups = _collect(
        bands, signature, order, states, trainable, roots, inexact, coupler.inexact, lambda: find_rows()[0]
    )
    return Grouping(groups, roots, prunable, tuple(events), tuple(open_rectangles), find_rows)


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


def _balance(
    rectangles: Sequence[Rectangle], roots: Ids, prunable: Mask, signature: Any
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
                axis, learnt = Axis(state.name, dim), trainable[state.name]
                masked = learnt and label.zero
                found.append(Member(axis, state.tensor, label.over, units, learnt, masked))
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
        because = f"{event.reason} at {event.at}" if event is not None else ""
        groups.append(Group(name, units, balance, event is None, because, build(number), find_rows))
    return tuple(groups)
