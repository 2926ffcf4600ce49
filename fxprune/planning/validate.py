"""Check a plan, which people may have edited, against the constraints of the groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..coupling.graph import CouplingGraph
from ..coupling.groups import Group
from ..errors import PlanError
from .patterns import nearest
from .plan import Problem, PruningPlan
from .whole_rows import without_rows


def problems(plan: PruningPlan, graph: CouplingGraph) -> Iterator[Problem]:
    """Every constraint of the groups of ``graph`` that ``plan`` breaks."""
    known = {group.name: group for group in graph.groups}
    for name, units in plan.removed.items():
        group = known.get(name)
        if group is None:
            close = nearest(name, known, 1)
            hint = f"; the nearest is {close[0]!r}" if close else ""
            yield Problem(name, f"the model has no such group{hint}")
            continue
        if plan.sizes.get(name) != group.size:
            yield Problem(name, f"has {group.size} units, the plan was made for {plan.sizes.get(name)}")
            continue
        if not all(type(unit) is int for unit in units):
            yield Problem(name, f"positions are whole numbers, got {list(units)!r}")
            continue
        outside = sorted({unit for unit in units if not 0 <= unit < group.size})
        if outside:
            yield Problem(name, f"has {group.size} units, numbered from 0; there are none at {outside}")
            continue
        twice = sorted(unit for unit, times in Counter(units).items() if times > 1)
        if twice:
            yield Problem(name, f"names the units {twice} more than once")
        if wrong := _uneven(group, units):
            yield Problem(name, wrong)
        yield from _balance(without_rows(group, _whole_rows(plan, graph, name)), units)


def _whole_rows(plan: PruningPlan, graph: CouplingGraph, name: str) -> list[int]:
    """Units of the group ``name`` in rows that go from all of their groups."""
    gone = {group: set(units) for group, units in plan.removed.items()}
    return [
        unit
        for rows in graph.rows
        for row in rows.rows
        if name in row and all(gone.get(other, set()) >= set(units.tolist()) for other, units in row.items())
        for unit in row[name].tolist()
    ]


def _uneven(group: Group, units: Sequence[int]) -> str:
    """What is wrong with how many units would be left, or empty."""
    left = group.size - len(set(units))
    if not units or not left % group.multiple:
        return ""
    return f"an operator takes multiples of {group.multiple} units, and {left} would be left"


def _balance(group: Group, units: Sequence[int]) -> Iterator[Problem]:
    """Rows that lose everything, and balanced sets whose rows lose unequal shares."""
    gone = np.zeros(group.size, dtype=bool)
    gone[list(units)] = True
    for rows in group.balance:
        lost = [int(gone[row].sum()) for row in rows]
        names = [f"the row of units {row.min()} to {row.max()}" for row in rows]
        empty = [name for name, row, n in zip(names, rows, lost, strict=True) if n == row.size]
        if empty:
            yield Problem(group.name, f"all units of {empty[0]} go; at least one must stay")
            continue
        shares = {n / row.size for n, row in zip(lost, rows, strict=True)}
        if len(shares) > 1:
            most = max(range(len(rows)), key=lambda i: lost[i] / rows[i].size)
            least = min(range(len(rows)), key=lambda i: lost[i] / rows[i].size)
            yield Problem(
                group.name,
                f"rows of a balanced set must lose the same share, but {names[most]} loses {lost[most]} of "
                f"{rows[most].size} and {names[least]} {lost[least]} of {rows[least].size}",
            )


def check_widths(graph: CouplingGraph, removed: Mapping[str, Sequence[int]]) -> None:
    """Refuse a plan that removes more from some rows than from others that remain, or that leaves a number
    of units that an operator does not take.

    Raises:
        PlanError: names the group, and the graph node that needs equal rows.
    """
    for group in graph.groups:
        if wrong := _uneven(group, removed.get(group.name, ())):
            raise PlanError(f"the plan cannot be carried out: of {group.name!r} {wrong}.")
    alive = graph.alive(removed)
    units_of = {group.name: group.units for group in graph.groups}
    for row_set in graph.rows:
        for row in row_set.rows:
            left = {name: bool(alive[units_of[name][units]].any()) for name, units in row.items()}
            if any(left.values()) and not all(left.values()):
                goes, stays = (next(n for n, some in left.items() if some is want) for want in (False, True))
                raise PlanError(
                    f"the plan removes a whole row of {goes!r}, units {row[goes].tolist()}, but not the same "
                    f"row of {stays!r}, units {row[stays].tolist()}. A row goes from both or from none."
                )
    found = unequal_rows(graph, removed)
    if found is not None:
        node, reason, groups = found
        raise PlanError(
            f"the plan cannot be carried out: node {node} {reason}. All rows of a balanced set of "
            f"{', '.join(groups)} must lose equally many units, or a row all of them."
        )


def unequal_rows(
    graph: CouplingGraph, removed: Mapping[str, Sequence[int]]
) -> tuple[str, str, tuple[str, ...]] | None:
    """The first node that would get rows of unequal width: its name, what it needs, the groups; or None."""
    alive = graph.alive(removed)
    units_of = {group.name: group.units for group in graph.groups}
    for rectangle in graph.rectangles:
        rows, cells = graph.classes(rectangle.rows), graph.classes(rectangle.cells)
        counts = alive[cells].sum(axis=1)[alive[rows]]
        if counts.size and (counts != counts[0]).any():
            groups = tuple(name for name in removed if np.isin(units_of[name], cells).any())
            node = rectangle.node.name if rectangle.node is not None else "?"
            return (
                node,
                f"needs rows of equal width, and would get rows of {counts.min()} to {counts.max()}",
                groups,
            )
    return None
