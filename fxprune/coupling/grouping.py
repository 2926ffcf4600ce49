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
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .coupler import Coupler
from .groups import BalancedSet, Group, Grouping, Mask, Member, RowSet
from .head_rows import RowFinder
from .products import Cells, close, groups_of_cells
from .roles import Uses
from .units import FIXED, Axis, Event, Ids, Rectangle, State, Units


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
    base = coupler.units.roots()
    signature: Any
    while True:
        frozen = _mask(base, [event.ids for event in events])
        frozen[FIXED] = True
        closed = close(base, frozen, coupler.units.products, open_rectangles)
        roots, frozen, cells = closed.roots, closed.frozen, closed.cells
        signature, present, order = _appearance(states, trainable, roots, cells)
        alone = closed.units[present[closed.units]]  # rows that hold axes of their own
        rectangles = [r for r in closed.rectangles if not np.isin(roots[r.rows], alone).all()]
        is_row = _mask(roots, [rectangle.rows for rectangle in rectangles])
        prunable = present & ~frozen & ~is_row
        prunable[cells.cells] = False
        balanced_sets, broken = _balance(closed.balanced, roots, prunable, signature, order)
        for rectangle in broken:
            stay = np.unique(roots[rectangle.cells])
            reason = "rows of unequal make-up cannot be kept equally long"
            events.append(Event(stay, Axis(rectangle.at, 1), rectangle.node, reason))
        if broken:
            continue
        number = np.full(roots.size, -1, dtype=np.int64)
        for atoms, component in zip(balanced_sets, _share_axes(balanced_sets, signature), strict=True):
            number[np.concatenate(atoms)] = component
        both = groups_of_cells(cells, number)
        if not both.size:
            break
        product = coupler.units.products[-1]
        events.append(Event(both, product.axis, product.node, "is flattened with an axis of the same group"))
    events += closed.events
    inexact = _first(roots, [event.ids for event in coupler.inexact])
    cells.collect(np.minimum, inexact)

    @functools.cache
    def find_rows() -> tuple[tuple[RowSet, ...], tuple[Event, ...]]:
        finder = RowFinder(rectangles, roots, frozen, is_row, balanced_sets, groups)
        finder.keep(coupler.inexact)
        row_sets = finder.row_sets(states, trainable)
        return row_sets, finder.events

    groups = _collect(
        balanced_sets,
        signature,
        order,
        states,
        trainable,
        roots,
        inexact,
        coupler.inexact,
        lambda: find_rows()[0],
        coupler.uses,
        cells,
        coupler.multiples,
    )
    cells.inherit(np.logical_or, prunable)
    return Grouping(groups, roots, prunable, tuple(events), tuple(rectangles), cells, find_rows)


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


def _mask(roots: Ids, arrays: Sequence[Ids]) -> Mask:
    """For each class whether some array holds a unit of it."""
    mask = np.zeros(roots.size, dtype=bool)
    if arrays:
        mask[roots[np.concatenate([array.ravel() for array in arrays])]] = True
    return mask


def _first(roots: Ids, arrays: Sequence[Ids]) -> Ids:
    """For each class the number of the first array that holds a unit of it; of arrays where none does."""
    first = np.full(roots.size, len(arrays))
    if arrays:
        numbers = np.repeat(np.arange(len(arrays)), [array.size for array in arrays])
        ids = np.concatenate([array.ravel() for array in arrays])
        first[roots[ids[::-1]]] = numbers[::-1]  # of several, the last to be written counts
    return first


def _appearance(
    states: Sequence[State], trainable: Mapping[str, bool], roots: Ids, cells: Cells
) -> tuple[NDArray[np.uint64], Mask, Ids]:
    """By class: a number for the axes that it lies on, whether one is a parameter's, and where it is first.

    Classes that lie equally often on the same axes have the same number, the sum of random numbers of axes.
    The parents of cells lie where these do.
    """
    labelled = [
        (label.ids, trainable[state.name]) for state in states for label in state.axes if label is not None
    ]
    random = np.random.default_rng(0).integers(1, 2**63, len(labelled)).tolist()
    arrays: dict[int, Ids] = {}
    keys: dict[int, int] = defaultdict(int)
    members: dict[int, bool] = defaultdict(bool)
    for (ids, member), key in zip(labelled, random, strict=True):
        arrays[id(ids)] = ids
        keys[id(ids)] += key
        members[id(ids)] |= member
    signature = np.zeros(roots.size, dtype=np.uint64)
    present = np.zeros(roots.size, dtype=bool)
    order = np.full(roots.size, np.iinfo(np.int64).max)
    end = sum(ids.size for ids in arrays.values())
    for number, ids in reversed(arrays.items()):  # of several places, the last to be written counts
        classes = roots[ids.ravel()]
        np.add.at(signature, classes, np.uint64(keys[number] % 2**64))
        if members[number]:
            present[classes] = True
        order[classes[::-1]] = np.arange(end - 1, end - 1 - classes.size, -1)
        end -= classes.size
    cells.collect(np.add, signature)
    cells.collect(np.logical_or, present)
    cells.collect(np.minimum, order)
    return signature, present, order


def _balance(
    rectangles: Sequence[Rectangle], roots: Ids, prunable: Mask, signature: Any, order: Ids
) -> tuple[list[BalancedSet], list[Rectangle]]:
    """Atoms (in order) linked into balanced sets, and rectangles whose rows cannot be matched."""
    rng = np.random.default_rng(1)
    place = signature.copy()
    index = np.zeros(roots.size, dtype=np.int64)
    constraints = []
    for rectangle in rectangles:
        cells = roots[rectangle.cells]
        n_rows = cells.shape[0]
        rows, columns = np.nonzero(prunable[cells])
        found = cells[rows, columns]
        inside = _distinct(found, roots.size)
        if not inside.size:
            continue
        index[inside] = np.arange(inside.size)
        counts = np.zeros((inside.size, n_rows), dtype=np.int64)
        np.add.at(counts, (index[found], rows), 1)
        uneven = (counts != counts[:, :1]).any(axis=1)
        if not uneven.any():
            continue  # every unit lies equally often in every row: balanced by itself
        keys = rng.integers(1, 2**62, size=n_rows, dtype=np.uint64)
        with np.errstate(over="ignore"):
            place[inside[uneven]] += counts[uneven].astype(np.uint64) @ keys
        constraints.append((rectangle, inside[uneven], counts[uneven]))
    classes = np.flatnonzero(prunable)
    classes = classes[np.argsort(order[classes])]
    classes = classes[np.argsort(place[classes], kind="stable")]
    starts = np.flatnonzero(np.diff(place[classes], prepend=~place[classes[:1]]))
    size = np.diff(starts, append=classes.size)
    first = classes[starts]
    atoms = [classes[start : start + n] for start, n in zip(starts.tolist(), size.tolist(), strict=True)]
    atom_of = np.full(roots.size, -1)
    atom_of[classes] = np.repeat(np.arange(len(atoms)), size)
    lead, follow = [], []
    broken = []
    for rectangle, inside, counts in constraints:
        numbers = _distinct(atom_of[inside], len(atoms))
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
        lead += [atom[2] for atom in by_row[0]] * len(by_row)
        follow += [atom[2] for row in by_row for atom in row]
    links = Units()
    links.fresh(len(atoms))
    links.merge(np.array(lead, dtype=np.int64) + 1, np.array(follow, dtype=np.int64) + 1)  # 0 is not merged
    together: dict[int, list[Ids]] = defaultdict(list)
    for part, number in zip(atoms, links.roots()[1:].tolist(), strict=True):
        together[number].append(part)
    return [tuple(atoms) for atoms in together.values()], broken


def _distinct(numbers: Ids, bound: int) -> Ids:
    """The different numbers among these, which are less than ``bound``, in order."""
    seen = np.zeros(bound, dtype=bool)
    seen[numbers] = True
    return np.flatnonzero(seen)


def _collect(
    balanced_sets: Sequence[BalancedSet],
    signature: Any,
    order: Ids,
    states: Sequence[State],
    trainable: Mapping[str, bool],
    roots: Ids,
    inexact: Ids,
    reasons: Sequence[Event],
    find_rows: Callable[[], tuple[RowSet, ...]],
    uses: Uses,
    cells: Cells,
    asked: Sequence[tuple[Ids, int]],
) -> tuple[Group, ...]:
    """Join balanced sets that share member axes into groups."""
    components = _components(balanced_sets, signature, order)
    group_of = np.full(roots.size, len(components))  # the last stands for none
    position = np.full(roots.size, -1, dtype=np.int64)
    for number, (units, _) in enumerate(components):
        group_of[units] = number
        position[units] = np.arange(units.size)
    axes = _axes_of_groups(states, roots, cells, group_of, len(components))
    multiples = _multiples_of_groups(asked, roots, group_of)

    def build(number: int) -> Any:
        def inside(classes: Ids) -> Ids:
            return np.where(group_of[classes] == number, position[classes], -1)

        def members(group: Group) -> tuple[Member, ...]:
            return tuple(_member(state, dim, cells.look_up, inside, trainable, roots, uses)
                         for state, dim in axes[number])  # fmt: skip

        return members

    groups: list[Group] = []
    taken: dict[str, int] = defaultdict(int)
    for number, (units, own) in enumerate(components):
        state, dim = axes[number][0]
        name = str(Axis(state.name, dim))
        taken[name] += 1
        if taken[name] > 1:  # an axis may hold the units of several groups
            name = f"{name}:{taken[name]}"
        balance = tuple(tuple(position[atom] for atom in atoms) for atoms in own)
        number_of = int(inexact[units].min())
        event = reasons[number_of] if number_of < len(reasons) else None
        because = f"{event.reason} at {event.at}" if event is not None else ""
        multiple = multiples.get(number, 1)
        groups.append(Group(name, units, balance, event is None, because, multiple, build(number), find_rows))
    return tuple(groups)


def _multiples_of_groups(asked: Sequence[tuple[Ids, int]], roots: Ids, group_of: Ids) -> Mapping[int, int]:
    """By number of the group what the number of its units has to be a multiple of."""
    found: dict[int, int] = {}
    for ids, multiple in asked:
        for number in np.unique(group_of[roots[ids]]).tolist():
            found[number] = math.lcm(found.get(number, 1), multiple)
    return found


def _components(
    balanced_sets: Sequence[BalancedSet], signature: Any, order: Ids
) -> list[tuple[Ids, list[BalancedSet]]]:
    """For each group its units and its balanced sets, both in the order of the state dict."""
    together: dict[int, list[BalancedSet]] = defaultdict(list)
    for atoms, number in zip(balanced_sets, _share_axes(balanced_sets, signature), strict=True):
        together[number].append(tuple(sorted(atoms, key=lambda atom: int(order[atom[0]]))))
    components = []
    for own in together.values():
        units = np.concatenate([atom for atoms in own for atom in atoms])
        units = units[np.argsort(order[units], kind="stable")]
        own.sort(key=lambda atoms: int(order[atoms[0][0]]))
        components.append((units, own))
    components.sort(key=lambda item: int(order[item[0][0]]))
    return components


def _axes_of_groups(
    states: Sequence[State], roots: Ids, cells: Cells, group_of: Ids, count: int
) -> Mapping[int, list[tuple[State, int]]]:
    """For each group, by number, the axes that hold units of it; ``group_of`` gives ``count`` for none."""
    axes: dict[int, list[tuple[State, int]]] = defaultdict(list)
    touched: dict[int, list[int]] = {}
    for state in states:
        for dim, label in enumerate(state.axes):
            if label is None:
                continue
            if id(label.ids) not in touched:
                classes = roots[label.ids].ravel()
                classes = cells.ancestors(classes) if cells.cells.size else classes
                touched[id(label.ids)] = _distinct(group_of[classes], count + 1).tolist()
            for number in touched[id(label.ids)]:
                axes[number].append((state, dim))
    return axes


def _member(
    state: State,
    dim: int,
    look_up: Callable[[Ids, Callable[[Ids], Ids]], Ids],
    inside: Callable[[Ids], Ids],
    trainable: Mapping[str, bool],
    roots: Ids,
    uses: Uses,
) -> Member:
    """The member of a group that one of its axes is; ``inside`` gives positions in the group, -1 outside."""
    label, tensor = state.axes[dim], state.tensor
    assert label is not None
    assert tensor is not None
    units = look_up(roots[label.ids], inside)
    axis, learnt = Axis(state.name, dim), trainable[state.name]
    acts = tuple(uses.by_axis.get(axis, ()))
    return Member(axis, tensor, label.over, units, learnt, learnt and label.zero, acts)


def _share_axes(balanced_sets: Sequence[BalancedSet], signature: Any) -> list[int]:
    """For each balanced set the number of its group: sets with units on the same axes share one."""
    owner = np.array([number for number, atoms in enumerate(balanced_sets) for _ in atoms], dtype=np.int64)
    first = np.array([atom[0] for atoms in balanced_sets for atom in atoms], dtype=np.int64)
    _, axes = np.unique(signature[first], return_inverse=True)
    joined = Units()
    joined.fresh(len(balanced_sets) + owner.size)
    joined.merge(owner + 1, len(balanced_sets) + axes + 1)  # unit 0 is not merged
    numbers: list[int] = joined.roots()[1 : len(balanced_sets) + 1].tolist()
    return numbers
