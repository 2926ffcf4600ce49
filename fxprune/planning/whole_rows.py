"""Whole rows: which attention heads and groups of convolutions go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..coupling.graph import CouplingGraph
from ..coupling.groups import Group

Scores = NDArray[np.float64]


def select_rows(
    graph: CouplingGraph, heads: float, allowed: Callable[[Group], bool], values: Callable[[Group], Scores]
) -> dict[str, list[int]]:
    """The units of the rows (attention heads, convolution groups) to remove from each group.

    Of every set of ``n`` rows, the ``floor(heads * n)`` go whose units have the lowest scores in sum over
    all groups; one row at least stays. A row goes only if all groups it lies in are ``allowed``.
    """
    groups = {group.name: group for group in graph.groups}
    gone: dict[str, list[int]] = {}
    for rows in graph.rows:
        count = min(int(heads * rows.total + 1e-9), rows.total - 1)
        if not count or not all(allowed(groups[name]) for name in rows.groups):
            continue
        totals = [
            sum(float(values(groups[name])[units].sum()) for name, units in row.items()) for row in rows.rows
        ]
        left = [set(together.tolist()) for together in rows.together]
        for number in np.argsort(totals, kind="stable").tolist():
            if not count:
                break
            if {number} in left:
                continue
            count -= 1
            for together in left:
                together.discard(number)
            for name, units in rows.rows[number].items():
                gone.setdefault(name, []).extend(units.tolist())
    return gone


def without_rows(group: Group, gone: Sequence[int]) -> Group:
    """The same group, in whose balanced sets the rows that are ``gone`` as a whole do not count."""
    if not gone:
        return group
    dead = np.zeros(group.size, dtype=bool)
    dead[list(gone)] = True
    balance = (tuple(row for row in atoms if not dead[row].all()) for atoms in group.balance)
    return replace(group, balance=tuple(atoms for atoms in balance if atoms))
