"""What goes if some channels of a layer go: a group in readable lines."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import AxisError
from .graph import CouplingGraph, Explanation, Link
from .groups import Group, RowSet
from .roles import in_module, makes_outputs
from .units import Axis, Ids


@dataclass(frozen=True)
class RemovalStep:
    """One line of a removal.

    Attributes:
        axis: a parameter or buffer and its dimension; on the way between two of them, the value of a node.
        indices: what goes of it, in words; empty for values of nodes.
        link: through which node it hangs on which axis; None for the root.
        depth: number of links to the root.
    """

    axis: Axis
    indices: str
    link: Link | None
    depth: int


@dataclass(frozen=True)
class Removal:
    """What goes with some indices of an axis; ``str()`` of it is meant to be read.

    Attributes:
        root: the axis asked for.
        indices: the indices asked for.
        removed: the units that go, by the name of their group, as in :class:`~fxprune.PruningPlan`.
        steps: the axes that are narrowed, each below the one that it hangs on.
        balance: what else has to go, so that rows stay equally long.
        kept: what was asked for but cannot go, and why.
    """

    root: Axis
    indices: tuple[int, ...]
    removed: dict[str, list[int]]
    steps: tuple[RemovalStep, ...]
    balance: tuple[str, ...]
    kept: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.root}, indices {ranges(self.indices)}"]
        lines += [f"  stays: {text}" for text in self.kept]
        width = max((2 * step.depth + len(str(step.axis)) for step in self.steps), default=0)
        for step in self.steps:
            text = f"{'  ' * step.depth}{step.axis}".ljust(width)
            if step.indices:
                text = f"{text}  {step.indices}"
            if step.link is not None:
                source = f" ({step.link.source})" if step.link.source else ""
                text = f"{text}  through {step.link.node}{source}"
            lines.append(f"  {text}")
        lines += [f"  balance: {text}" for text in self.balance]
        return "\n".join(lines)


def removable(
    graph: CouplingGraph, name: str, idxs: Iterable[int] | None = None, dim: int | None = None
) -> Removal:
    """What has to go if some indices of an axis go: which other axes, which of their indices, and why.

        print(fxprune.removable(fxprune.analyze(model, x), "conv1", idxs=[2, 6, 9]))

    Args:
        graph: what :func:`fxprune.analyze` gave.
        name: a parameter (``"conv1.weight"``), or a module, which stands for the output of its weight.
        idxs: indices along the axis; all that can go by default.
        dim: the axis of the parameter; by default the one that makes the outputs of its module.

    Raises:
        AxisError: for a name, a dimension or an index that is not there; suggests the nearest names.
    """
    if not isinstance(graph, CouplingGraph):
        raise AxisError(f"removable takes what fxprune.analyze(model, x) gave, got {type(graph).__name__}.")
    parameter, module = _parameter(graph, name)
    if dim is None:
        dim = _output(graph, parameter, module)
    try:
        explanation = graph.goes_with(parameter, dim)
    except KeyError as error:
        raise AxisError(str(error.args[0])) from error
    root = explanation.axis
    state = graph.states[root.name]
    size = state.shape[root.dim]
    asked = range(size) if idxs is None else [int(i) for i in idxs]
    wrong = [i for i in asked if not 0 <= i < size]
    if wrong:
        raise AxisError(f"{root} has the indices 0 to {size - 1}; there are no {wrong} among them.")
    indices = tuple(sorted(set(asked)))
    gone: dict[int, Ids] = {}
    movable = np.zeros(size, dtype=bool)
    for number, group in enumerate(explanation.groups):
        for member in group.members:
            if member.axis == root:
                units = member.units.reshape(-1, size)
                movable |= (units >= 0).any(axis=0)
                wanted = np.unique(units[:, list(indices)])
                gone[number] = wanted[wanted >= 0]
    kept = _kept(indices, movable, explanation)
    groups = [(group, gone[number]) for number, group in enumerate(explanation.groups) if gone[number].size]
    return Removal(
        root,
        indices,
        {group.name: units.tolist() for group, units in groups},
        _steps(explanation, groups),
        (
            *_whole_rows(graph.rows, {group.name: units for group, units in groups}),
            *(text for group, units in groups for text in _balance(group, units)),
        ),
        kept,
    )


def ranges(indices: Iterable[int]) -> str:
    """``0-3, 8`` for ``[0, 1, 2, 3, 8]``."""
    array = np.unique(np.fromiter(indices, dtype=np.int64))
    parts = np.split(array, np.flatnonzero(np.diff(array) != 1) + 1) if array.size else []
    return ", ".join(str(p[0]) if p.size == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _parameter(graph: CouplingGraph, name: Any) -> tuple[str, str]:
    """The parameter that ``name`` means, and the path of its module."""
    tensors = graph.captured.program.tensors
    if not isinstance(name, str):
        raise AxisError(
            f"an axis is found by the name of its layer, as in model.named_modules(), or of its parameter; "
            f"got a {type(name).__name__}."
        )
    if name in tensors:
        return name, name.rpartition(".")[0]
    own = [key for key in tensors if key.rpartition(".")[0] == name]
    if not own or not name:
        modules = {key.rpartition(".")[0] for key in tensors} - {""}
        close = difflib.get_close_matches(name, [*modules, *tensors], n=3)
        hint = f"; the nearest names are {', '.join(close)}" if close else ""
        raise AxisError(f"there is no parameter, and no module with parameters, named {name!r}{hint}.")
    return next((key for key in own if key == f"{name}.weight"), own[0]), name


def _output(graph: CouplingGraph, name: str, module: str) -> int:
    """The axis of a parameter by which its module makes outputs; of those that only follow the last."""
    tensor = graph.captured.program.tensors[name]
    state = next((state for state in graph.states.values() if state.tensor is tensor), None)
    if state is None:
        return 0
    uses = [in_module(graph.uses(Axis(state.name, dim)), module) for dim in range(tensor.dim())]
    made = [dim for dim, own in enumerate(uses) if own and makes_outputs(own)]
    follows = [dim for dim, own in enumerate(uses) if not own and state.axes[dim] is not None]
    return made[0] if made else max(follows, default=0)


def _kept(indices: tuple[int, ...], movable: np.ndarray, explanation: Explanation) -> tuple[str, ...]:
    stuck = [i for i in indices if not movable[i]]
    if not stuck:
        return ()
    frozen = explanation.frozen
    if frozen is None:
        return (f"{ranges(stuck)}: meets an axis that cannot be narrowed",)
    at = f" at {frozen.node}" if frozen.node else ""
    source = f" ({frozen.source})" if frozen.source else ""
    return (f"{ranges(stuck)}: {frozen.reason}{at}{source}",)


def _steps(explanation: Explanation, groups: list[tuple[Group, Ids]]) -> tuple[RemovalStep, ...]:
    """The axes as a tree below the root, in depth-first order."""
    texts: dict[Axis, list[str]] = {}
    for group, units in groups:
        for member in group.members:
            hit = np.isin(member.units, units)
            if hit.any():
                rows = hit.reshape(-1, hit.shape[-1])
                rows = rows[rows.any(axis=1)]
                text = f"[{ranges(np.flatnonzero(rows.any(axis=0)))}]"
                if (rows != rows[0]).any():
                    text += f", {ranges(rows.sum(axis=1))} a row"
                texts.setdefault(member.axis, []).append(text)
    links: dict[Axis, Link] = {}
    below: dict[Axis, list[Axis]] = {}
    for axis in texts:
        for link in explanation.paths.get(axis, ()):
            if link.axis not in links and link.axis != explanation.axis:
                links[link.axis] = link
                below.setdefault(link.via, []).append(link.axis)
    steps: list[RemovalStep] = []
    stack = [(explanation.axis, 0)] if texts else []
    while stack:
        axis, depth = stack.pop()
        steps.append(RemovalStep(axis, " and ".join(texts.get(axis, ())), links.get(axis), depth))
        stack += [(other, depth + 1) for other in reversed(below.get(axis, []))]
    reached = {step.axis for step in steps}
    steps += [
        RemovalStep(axis, " and ".join(text), None, 1) for axis, text in texts.items() if axis not in reached
    ]
    return tuple(steps)


def _whole_rows(sets: tuple[RowSet, ...], gone: dict[str, Ids]) -> list[str]:
    """What goes with rows (heads, groups of a convolution) of which some group loses all units."""
    texts = []
    for row in (row for rows in sets for row in rows.rows):
        by_group = {name: np.isin(units, gone.get(name, ())) for name, units in row.items()}
        if any(hit.all() for hit in by_group.values()):
            first = next(name for name, hit in by_group.items() if hit.all())
            more = {name: row[name][~hit] for name, hit in by_group.items() if not hit.all()}
            texts += [
                f"a whole row of {first} goes, so it needs units {ranges(units)} of {name}, too"
                for name, units in more.items()
            ]
    return texts


def _balance(group: Group, units: Ids) -> list[str]:
    """What else must go in the rows that remain of a group, so that all of them lose the same share."""
    texts = []
    whole = [row for row in group.rows if np.isin(row, units).all()]
    gone = np.concatenate(whole) if whole else np.empty(0, dtype=np.int64)
    for every in group.balance:
        atoms = [row for row in every if not np.isin(row, gone).all()]
        if not atoms:
            texts.append(f"all rows of {group.name} would go; at least one must stay")
            continue
        parts = math.gcd(*(row.size for row in atoms))
        counts = [int(np.isin(row, units).sum()) for row in atoms]
        share = max(-(-count * parts // row.size) for count, row in zip(counts, atoms, strict=True))
        more = [share * (row.size // parts) - count for count, row in zip(counts, atoms, strict=True)]
        if not any(more):
            continue
        if share == parts:
            texts.append(
                f"a row of {group.name} would lose all of its units; one that cannot go as a whole keeps "
                f"at least one"
            )
            continue
        by_need: dict[int, list[int]] = {}
        for row, need in enumerate(more):
            if need:
                by_need.setdefault(need, []).append(row)
        for need, rows in by_need.items():
            texts.append(
                f"also needs {need} more in row{'s' if len(rows) > 1 else ''} {ranges(rows)} of the "
                f"{len(atoms)} rows that remain of {group.name} "
                f"({atoms[rows[0]].size} units each); any will do"
            )
    return texts


__all__ = ["Removal", "RemovalStep", "removable"]
