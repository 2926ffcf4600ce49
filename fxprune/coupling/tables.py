"""Tables: where a buffer or constant, or what is computed from such, is narrowed.

A table that meets narrower operands can become narrower itself, at its source. That couples all who use it:
a table of rotary angles (Su et al., 2021, https://arxiv.org/abs/2104.09864) serves every head of every
layer, so that all of them would have to lose the same columns. Where so, the table stays whole, and each
user picks from it what it needs. Where the users go together anyway, the source is narrowed, which costs
nothing at run time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
from torch import fx

from .coupler import Coupler
from .groups import Mask
from .units import FIXED, Ids, TableUse, Units, Value


def decide_tables(coupler: Coupler, source: Callable[[fx.Node, Value], fx.Node | None]) -> None:
    """Merge the units of tables with those that they met, or have the nodes pick from them.

    Args:
        coupler: the analysis, with its ``table_uses``; gets its ``tables``.
        source: the node whose output a table is, by the node that uses it; None where the user has it from
            elsewhere, or does more with it than to meet it.
    """
    if not coupler.units.any_tables:
        return
    if coupler.table_uses:
        for rows in (False, True):  # which rows go together follows from their cells
            _decide(coupler, source, rows)
    coupler.whole = np.flatnonzero(coupler.units.tables())


def _decide(coupler: Coupler, source: Callable[[fx.Node, Value], fx.Node | None], rows: bool) -> None:
    """:func:`decide_tables` for tables beside rows, or for all others."""
    units = coupler.units
    roots, of_table = units.roots(), units.tables()
    same, is_row = _alike(coupler, roots)
    stays = np.zeros(units.count, dtype=bool)
    for event in coupler.frozen:
        stays[roots[event.ids]] = True
    met = [
        (node, use)
        for node, noted in coupler.table_uses.items()
        for use in noted
        if is_row[roots[use.units]].any() == rows
    ]
    for part in _parts(roots, [use for _, use in met]):
        sources = [source(met[number][0], met[number][1].table) for number in part]
        table_uses = [met[number][1] for number in part]
        hard = not all((of_table[m.units] | (m.units == FIXED)).all() for m in table_uses)
        frozen = any(stays[roots[m.units]].any() for m in table_uses)
        alone = not frozen and not _ties(roots, same, table_uses)
        if hard or None in sources or alone:
            for number in part:
                coupler.node, use = met[number]
                coupler.merge(use.others, use.units, use.others_axis, use.axis)
            continue
        for number, node in zip(part, sources, strict=True):
            assert node is not None
            user = met[number][0]
            coupler.by_size.add(user)
            coupler.tables.setdefault(user, []).append(node)


def _parts(roots: Ids, table_uses: list[TableUse]) -> list[list[int]]:
    """The numbers of the uses that share a table, together."""
    tables = [roots[use.units.ravel()] for use in table_uses]
    joined, place = _some(roots.size, tables)
    for table in tables:
        joined.merge(place[table[:1]], place[table])
    parts: dict[int, list[int]] = defaultdict(list)
    for number, table in enumerate(tables):
        parts[int(joined.find(place[table[:1]])[0])].append(number)
    return list(parts.values())


def _alike(coupler: Coupler, roots: Ids) -> tuple[Ids, Mask]:
    """For each class its number, and whether it is one of rows.

    Rows that go together, as the heads of two views of one stream, have one number.
    """
    pairs = [(roots[rectangle.rows], roots[rectangle.cells]) for rectangle in coupler.rectangles]
    same, is_row = np.arange(roots.size), np.zeros(roots.size, dtype=bool)
    if pairs:
        blocks, place = _some(roots.size, [ids for pair in pairs for ids in pair])
        for own, cells in pairs:
            blocks.merge(place[own][:, None], place[cells])
        rows = np.unique(np.concatenate([own for own, _ in pairs]))
        _, first, number = np.unique(blocks.find(place[rows]), return_index=True, return_inverse=True)
        same[rows] = rows[first[number]]
        is_row[rows] = True
    return same, is_row


def _ties(roots: Ids, same: Ids, table_uses: list[TableUse]) -> bool:
    """Whether merging the tables would merge others that are not."""
    pairs = [(same[roots[use.others]], same[roots[use.units]]) for use in table_uses]
    trial, place = _some(roots.size, [ids for pair in pairs for ids in pair])
    for met, own in pairs:
        trial.merge(place[met], place[own])
    others = np.unique(np.concatenate([met.ravel() for met, _ in pairs]))
    return np.unique(trial.find(place[others])).size < others.size


def _some(count: int, classes: list[Ids]) -> tuple[Units, Ids]:
    """Units for these classes of ``count`` alone, in their order, and for each class which is its unit.

    Few of a network's units are met by tables, or stand in rows.
    """
    found = np.zeros(count, dtype=bool)
    for ids in classes:
        found[ids] = True
    place: Ids = np.cumsum(found)  # from 1 on: the first unit is not merged
    units = Units()
    units.fresh(int(place[-1]))
    return units, place


__all__ = ["decide_tables"]
