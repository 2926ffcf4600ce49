"""Score: one number for each unit of each group; the units with the lowest go first.

A criterion is a function of a group. The built-in ones see the whole graph at once, because a weight
that belongs to several groups is then read once. Each family has its file:

- weights alone: :class:`Magnitude`, :class:`LAMP`, :class:`BNScale`, random; :class:`FPGM`;
- derivatives of a loss over data: :class:`Taylor`, :class:`Fisher`, :class:`Hessian`;
- activations over data: :class:`Activation`, :class:`Wanda`, :class:`KFAC`;
- before training: :class:`SNIP`, :class:`SynFlow`.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ..coupling.graph import CouplingGraph
from ..coupling.groups import Group
from ..errors import ImportanceError
from .activation import KFAC, Activation, Wanda
from .base import Criterion, MemberCriterion, Scores
from .calibration import supervised
from .gradient import Fisher, Hessian, Taylor
from .initialization import SNIP, SynFlow
from .magnitude import LAMP, BNScale, Magnitude, magnitude, random
from .similarity import FPGM

__all__ = [
    "BUILT_IN",
    "FPGM",
    "KFAC",
    "LAMP",
    "SNIP",
    "Activation",
    "BNScale",
    "Criterion",
    "Fisher",
    "Hessian",
    "Importance",
    "Magnitude",
    "MemberCriterion",
    "SynFlow",
    "Taylor",
    "Wanda",
    "describe",
    "score",
    "supervised",
]

Importance = str | Criterion | Callable[[Group], Any]
"""A name from :data:`BUILT_IN`, a criterion, or a function of a group that returns ``group.size`` numbers."""

BY_CLASS: dict[str, Callable[[CouplingGraph, int], Scores]] = {
    "l1": lambda graph, seed: magnitude(graph, 1),
    "l2": lambda graph, seed: magnitude(graph, 2),
    "random": random,
}

BUILT_IN: dict[str, Callable[[CouplingGraph, int], Scores] | Criterion] = {
    **BY_CLASS,
    "bn_scale": BNScale(),
    "lamp": LAMP(),
    "fpgm": FPGM(),
    "synflow": SynFlow(),
}
"""Criteria that need nothing but the weights, by name."""

WITH_DATA = {
    "taylor": "Taylor(loss, data)",
    "fisher": "Fisher(loss, data)",
    "hessian": "Hessian(loss, data)",
    "kfac": "KFAC(loss, data)",
    "snip": "SNIP(loss, data)",
    "activation": "Activation(data)",
    "wanda": "Wanda(data)",
}
"""Criteria that need data: what has to be given in place of the name."""

OTHER_NAMES = {"magnitude": "l2", "norm": "l2", "bnscale": "bn_scale", "obd": "hessian", "obdc": "kfac"}
"""What people call criteria, and the name that one has here."""


def score(
    graph: CouplingGraph,
    importance: Importance,
    seed: int = 0,
    model: nn.Module | None = None,
    earlier: Callable[[Group], Scores] | None = None,
) -> Callable[[Group], Scores]:
    """A function from group to scores ``(group.size,)``; higher is more important.

    Args:
        graph: the analysis.
        importance: a name, a criterion, or a function of a group.
        seed: for criteria with something random.
        model: the model that was analysed; criteria that run it need it.
        earlier: what this function returned for another analysis of the same model. Criteria that only read
            the members of groups are not asked again, so that data are gone through once.

    Raises:
        ImportanceError: for an unknown name, for what a criterion cannot measure, or scores of the wrong
            number, not finite, or complex.
    """
    found: Any = BUILT_IN.get(importance) if isinstance(importance, str) else importance
    if isinstance(importance, str):
        if found is None:
            raise _unknown(importance)
        if importance in BY_CLASS:
            with _weights_read_by(importance, graph):
                by_class = BY_CLASS[importance](graph, seed)
            return lambda group: _checked(by_class[group.units], group)
    if isinstance(found, type) and issubclass(found, Criterion):
        raise ImportanceError(
            f"importance is the class {found.__name__}; give an instance, {_example(found)}."
        )
    if isinstance(found, Criterion):
        if earlier is not None:
            return earlier
        with _weights_read_by(importance, graph):
            found = found.prepare(graph, model if model is not None else nn.Module(), seed)
    if not callable(found):
        raise ImportanceError(
            f"importance must be a name, a criterion or a function of a group, got {type(found).__name__}."
        )

    def scores(group: Group) -> Scores:
        with _weights_read_by(importance, graph):
            return _checked(found(group), group)

    return scores


@contextlib.contextmanager
def _weights_read_by(importance: Importance, graph: CouplingGraph) -> Iterator[None]:
    """Say what it means that ``importance`` asked a tensor on the meta device for its values."""
    try:
        yield
    except NotImplementedError as error:
        tensors = graph.captured.program.tensors.items()
        hollow = next((name for name, tensor in tensors if tensor.is_meta), None)
        if hollow is None:
            raise
        raise ImportanceError(
            f"importance {describe(importance)!r} reads the weights, and {hollow!r} is on the meta device "
            f"and has none: load weights first, or use 'random', or a function of a group that needs none."
        ) from error


def describe(importance: Importance) -> str:
    """What a plan's settings say of an importance."""
    if isinstance(importance, (str, Criterion)):
        return str(importance)
    return getattr(importance, "__name__", "custom")


def _unknown(name: str) -> ImportanceError:
    if name in WITH_DATA:
        return ImportanceError(
            f"importance {name!r} needs more than a name: give fxprune.importance.{WITH_DATA[name]}."
        )
    if name.lower() in WITH_DATA:
        return _unknown(name.lower())
    close = difflib.get_close_matches(name.lower(), [*BUILT_IN, *WITH_DATA, *OTHER_NAMES], n=1, cutoff=0.4)
    nearest = f" Did you mean {OTHER_NAMES.get(close[0], close[0])!r}?" if close else ""
    names = ", ".join(map(repr, BUILT_IN))
    return ImportanceError(
        f"unknown importance {name!r}; use {names}, a criterion from fxprune.importance, or a function of a "
        f"group.{nearest}"
    )


def _example(criterion: type[Criterion]) -> str:
    return f"fxprune.importance.{WITH_DATA.get(criterion.__name__.lower(), criterion.__name__ + '()')}"


def _checked(scores: Any, group: Group) -> Scores:
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().to("cpu").resolve_conj()
        scores = (scores if scores.is_complex() else scores.to(torch.float64)).numpy()
    try:
        array = np.asarray(np.real(scores), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ImportanceError(
            f"the importance returned {type(scores).__name__} for {group!r}; it must return one "
            f"number for each of its {group.size} units."
        ) from error
    if np.iscomplexobj(scores):
        raise ImportanceError(f"the importance returned complex numbers for {group!r}; they have no order.")
    if array.shape != (group.size,):
        raise ImportanceError(
            f"the importance returned shape {array.shape} for {group!r}; expected ({group.size},)."
        )
    if not np.isfinite(array).all():
        held = [m for m in group.members if not m.tensor.is_meta]
        broken = [m.axis.name for m in held if not bool(torch.isfinite(m.tensor).all())]
        because = f": the parameter {broken[0]!r} holds such values. Load other weights" if broken else ""
        raise ImportanceError(f"the importance returned NaN or infinity for {group!r}{because}.")
    return array
