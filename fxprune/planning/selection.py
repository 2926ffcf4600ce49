"""Selection: from scores to the units that go."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..coupling.graph import CouplingGraph
from ..coupling.groups import Group
from ..errors import RatioError


def check_ratio(ratio: Any) -> float:
    """Refuse a ratio outside ``0 <= ratio < 1``."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise RatioError(
            f"ratio is the share of units to remove from every group, with 0 <= ratio < 1; got {ratio!r}."
        )
    return float(ratio)


def select(
    graph: CouplingGraph,
    ratio: float,
    scores: Callable[[Group], Any],
    where: Callable[[Group], bool] | None = None,
) -> dict[str, list[int]]:
    """The units to remove from each group: ``floor(ratio * n)`` lowest-scored ones of each row of ``n``.

    Every row keeps at least one unit, and rows that must stay equally long lose the same share. Ties
    are broken by position, so that the same scores always give the same units.
    """
    removed = {}
    for group in graph.groups:
        if ratio == 0 or (where is not None and not where(group)):
            continue
        values = None
        gone: list[int] = []
        for band in group.balance:
            steps = math.gcd(*(row.size for row in band))
            for row in band:
                count = int(ratio * steps + 1e-9) * (row.size // steps)
                if count:
                    if values is None:
                        values = np.asarray(scores(group))
                    gone += row[np.argsort(values[row], kind="stable")[:count]].tolist()
        if gone:
            removed[group.name] = sorted(gone)
    return removed
