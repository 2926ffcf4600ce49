"""Check a plan, which people may have edited, against the constraints of the groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from ..coupling.groups import Group
from .patterns import nearest
from .plan import Problem, PruningPlan


def problems(plan: PruningPlan, groups: Iterable[Group]) -> Iterator[Problem]:
    """Every constraint of ``groups`` that ``plan`` breaks."""
    known = {group.name: group for group in groups}
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
        yield from _balance(group, units)


def _balance(group: Group, units: Iterable[int]) -> Iterator[Problem]:
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
