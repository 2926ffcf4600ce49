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
from .units import FIXED, Ids, Meeting, Units, Value


def settle(coupler: Coupler, source: Callable[[fx.Node, Value], fx.Node | None]) -> None:
    """Merge the units of tables with those that they met, or have the nodes pick from them.

    Args:
        coupler: the analysis, with its ``meetings``; gets its ``tables``.
        source: the node whose output a table is, by the node that uses it; None where the user has it from
            elsewhere, or does more with it than to meet it.
    """
    units = coupler.units
    if not units.any_loose:
        return
    roots, loose = units.roots(), units.all_loose()
    met = [(node, meeting) for node, noted in coupler.meetings.items() for meeting in noted]
    for part in _parts(roots, [meeting for _, meeting in met]):
        sources = [source(met[number][0], met[number][1].table) for number in part]
        meetings = [met[number][1] for number in part]
        hard = not all((loose[m.units] | (m.units == FIXED)).all() for m in meetings)
        if hard or None in sources or not _ties(roots, meetings):
            for number in part:
                coupler.node, meeting = met[number]
                coupler.merge(meeting.met, meeting.units, meeting.met_axis, meeting.axis)
            continue
        for number, node in zip(part, sources, strict=True):
            assert node is not None
            user = met[number][0]
            coupler.by_size.add(user)
            coupler.tables.setdefault(user, []).append(node)
    coupler.whole = np.flatnonzero(units.all_loose())


def _parts(roots: Ids, meetings: list[Meeting]) -> list[list[int]]:
    """Numbers of meetings by the tables that they share."""
    joined = Units()
    joined.fresh(roots.size)
    for meeting in meetings:
        own = roots[meeting.units.ravel()] + 1
        joined.merge(own[:1], own)
    parts: dict[int, list[int]] = defaultdict(list)
    for number, meeting in enumerate(meetings):
        parts[int(joined.find(roots[meeting.units.ravel()[:1]] + 1)[0])].append(number)
    return list(parts.values())


def _ties(roots: Ids, meetings: list[Meeting]) -> bool:
    """Whether merging the tables would merge others that are not."""
    trial = Units()
    trial.fresh(roots.size)
    others = set()
    for meeting in meetings:
        trial.merge(roots[meeting.met] + 1, roots[meeting.units] + 1)  # unit 0 is not merged
        others |= set(roots[meeting.met.ravel()].tolist())
    classes = np.fromiter(others, dtype=np.int64)
    return np.unique(trial.find(classes + 1)).size < classes.size


__all__ = ["settle"]
