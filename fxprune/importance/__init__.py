"""Score: one number for each unit of each group; the units with the lowest go first.

A criterion is a function of a group. The built-in ones see the whole graph at once, because a weight
that belongs to several groups is then read once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..coupling.graph import CouplingGraph
from ..coupling.groups import Group
from ..errors import ImportanceError
from .magnitude import magnitude, random

__all__ = ["BUILT_IN", "Importance", "score"]

Scores = NDArray[np.float64]
Importance = str | Callable[[Group], Any]
"""``"l1"``, ``"l2"``, ``"random"``, or a function of a group that returns ``group.size`` numbers."""

BUILT_IN: dict[str, Callable[[CouplingGraph, int], Scores]] = {
    "l1": lambda graph, seed: magnitude(graph, 1),
    "l2": lambda graph, seed: magnitude(graph, 2),
    "random": random,
}


def score(graph: CouplingGraph, importance: Importance, seed: int = 0) -> Callable[[Group], Scores]:
    """A function from group to scores ``(group.size,)``; higher is more important.

    Raises:
        ImportanceError: for an unknown name, or scores of the wrong number, not finite, or complex.
    """
    if isinstance(importance, str):
        if importance not in BUILT_IN:
            names = ", ".join(repr(name) for name in BUILT_IN)
            raise ImportanceError(
                f"unknown importance {importance!r}; use {names}, or a function of a group."
            )
        by_class = BUILT_IN[importance](graph, seed)
        return lambda group: by_class[group.units]
    if not callable(importance):
        raise ImportanceError(
            f"importance must be a name or a function of a group, got {type(importance).__name__}."
        )
    return lambda group: _checked(importance(group), group)


def _checked(scores: Any, group: Group) -> Scores:
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().to("cpu").resolve_conj()
        scores = (scores if scores.is_complex() else scores.to(torch.float64)).numpy()
    try:
        array = np.asarray(np.real(scores), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ImportanceError(
            f"the importance function returned {type(scores).__name__} for {group!r}; it must return one "
            f"number for each of its {group.size} units."
        ) from error
    if np.iscomplexobj(scores):
        raise ImportanceError(
            f"the importance function returned complex numbers for {group!r}; they have no order."
        )
    if array.shape != (group.size,):
        raise ImportanceError(
            f"the importance function returned shape {array.shape} for {group!r}; expected ({group.size},)."
        )
    if not np.isfinite(array).all():
        raise ImportanceError(f"the importance function returned NaN or infinity for {group!r}.")
    return array
